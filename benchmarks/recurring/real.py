"""Streams in real bank accounts: `python real.py FOLDER`, a folder with the PKDD'99 tables `order.parquet` and `trans_*.parquet`.

The bank knew its customers' standing orders (to which account, how much), so for payments out there is a truth: an order that was
paid three times or more. The detector sees the rows with the other account's number as merchant, and then without any name.
"""

import sys
import time
from datetime import date
from pathlib import Path

import polars as pl

from fincoach.data.source import all_tables
from fincoach.data.tables import CATEGORY_ID
from fincoach.features.recurring import detect_spending_cycles, warm

AS_OF = date(1994, 4, 20)
PLACE = {"household": "rent", "insurrance_pmt": "insurance", "loan_pmt": "debt_payment", "service": "fees", "interest_pmt": "interest"}


def frames(rows, named):
    """The bank's rows as our tables; merchants are the other account's number, or unknown."""
    out = pl.col("type") == "debit"
    label = pl.when(pl.col("k_symbol").is_in([*PLACE])).then(pl.col("k_symbol").replace(PLACE)).when(out & (pl.col("operation") == "withdraw_cash")).then(
        pl.lit("cash")).when(out).then(pl.lit("uncategorised")).otherwise(pl.lit("other_income"))
    other = pl.when(pl.col("account") > 0).then(pl.format("account {}", pl.col("account").cast(pl.Int64)))
    moves = rows.select(
        pl.col("trans_id").alias("id"), pl.col("account_id").alias("user_id"),
        pl.col("date").cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias("occurred_at"),
        (pl.when(out).then(-pl.col("amount")).otherwise(pl.col("amount")) * 100).round().cast(pl.Int64).alias("amount_minor"),
        currency=pl.lit("CZK"), category_id=label.replace_strict(CATEGORY_ID, return_dtype=pl.Int64),
        merchant=other if named else pl.lit(None, pl.String))
    users = moves.group_by(pl.col("user_id").alias("id")).agg(pl.col("occurred_at").min().alias("created_at")).sort("id").with_columns(
        external_id=pl.col("id").cast(pl.String), timezone=pl.lit("UTC"), currency=pl.lit("CZK"))
    return all_tables(users=users, transactions=moves)


def orders(folder, rows):
    """Standing orders that were paid at least three times: order_id and its payments."""
    known = pl.read_parquet(folder / "order.parquet").select("order_id", "account_id", pl.col("account_to").cast(pl.Float64).alias("account"),
                                                            pl.col("amount").alias("ordered"))
    paid = rows.filter(pl.col("type") == "debit").join(known, on=["account_id", "account"]).filter((pl.col("amount") - pl.col("ordered")).abs() < 1)
    return paid.group_by("order_id").agg("trans_id").filter(pl.col("trans_id").list.len() >= 3)


def main(folder):
    rows = pl.concat([pl.read_parquet(p) for p in sorted(folder.glob("trans_1993*.parquet"))]).sort("account_id", "date", "trans_id")
    truth = orders(folder, rows)
    print(f"{rows['account_id'].n_unique():,} accounts, {len(rows):,} rows to {AS_OF}; {len(truth):,} standing orders paid three times or more")
    warm()
    for named in (True, False):
        data, begin = frames(rows, named), time.perf_counter()
        found = detect_spending_cycles(data, AS_OF).to_frame()
        took = time.perf_counter() - begin
        paid = found.filter(pl.col("direction") == "out").explode("transaction_ids").select(
            "stream_id", "category_id", pl.col("transaction_ids").cast(pl.Int64).alias("trans_id"))
        sizes = paid.group_by("stream_id").agg(pl.len().alias("size"), pl.col("category_id").first())
        pairs = (truth.with_columns(pl.col("trans_id").list.len().alias("n")).explode("trans_id").join(paid, on="trans_id")
                 .group_by("order_id", "stream_id", "n").len().join(sizes, on="stream_id")
                 .filter(pl.col("len") / (pl.col("size") + pl.col("n") - pl.col("len")) >= 0.5))
        judged = sizes.filter(~pl.col("category_id").is_in([CATEGORY_ID["cash"], CATEGORY_ID["fees"]]))
        right = judged.join(pairs, on="stream_id", how="semi")
        print(f"merchant {'known' if named else 'unknown'}: recall {pairs['order_id'].n_unique() / len(truth):.3f}, "
              f"precision {len(right) / len(judged):.3f} of {len(judged):,} streams out (cash and the bank's fees aside), {took:.1f} s")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "order.parquet").is_file():
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
