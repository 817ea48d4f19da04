"""One account, written as a bank or an app would write it: CSV, XLSX, OFX 1 and 2, QFX, CAMT.053, MT940, QIF, Plaid.

`sample_account()` is the account, `write_<format>(account)` gives a file's bytes. Everything is deterministic, so a test
can say what a reader must find. All writers stand on the formats' own documents, none on our readers.
"""

import csv
import io
import json
import random
from dataclasses import dataclass, replace
from datetime import date, timedelta
from html import escape


@dataclass(frozen=True)
class Entry:
    """One booked entry; `amount` in minor units, + in and - out; `balance` is the account's after it."""

    day: date
    amount: int
    payee: str
    text: str
    id: str
    balance: int = 0


@dataclass(frozen=True)
class Account:
    """An account from the start of `opens` to the end of `closes`; `opening` and `closing` in minor units."""

    number: str
    currency: str
    entries: tuple
    opening: int
    opens: date
    closes: date
    owner: str = "Jürgen Weiß"

    @property
    def closing(self):
        return self.opening + sum(e.amount for e in self.entries)


SHOPS = (
    ("Bäckerei Süßmilch", "Kartenzahlung Bäckerei", 180, 950), ("REWE Markt GmbH", "REWE SAGT DANKE 43211", 900, 9500),
    ("Café Größenwahn", "Kaffee, zum Mitnehmen", 320, 780), ("DB Vertrieb GmbH", "Fahrkarte 8QX2LM; Klasse 2", 270, 8900),
    ("Müller & Söhne OHG", 'Rechnung "4711"; Danke', 1500, 12000), ("Zahnärzte am Wall", "Prophylaxe, Beleg 77/3", 5000, 14000),
    ("IKEA Deutschland", "Einkauf Filiale 321", 1999, 45000), ("Señor Taco", "Menü für zwei", 1800, 4200),
)
MONTHLY = (  # day of the month, amount, payee, text
    (1, -89000, "Wohnbau Nord eG", "Miete Wohnung 12, Kd.-Nr. 90210/4"), (3, -1799, "Netflix International", "Abo Standard NFX-2291"),
    (5, -1099, "Spotify AB", "Premium P0A1B2C3"), (10, -4990, "Stadtwerke Köln", "Strom Abschlag Vertrag 5512"),
    (15, -20000, "Jürgen Weiß", "Umbuchung Tagesgeld"), (28, 268045, "Acme Maschinenbau GmbH", "Lohn und Gehalt, Personal-Nr. 1337"),
)


def sample_account(days=365, start=date(2025, 1, 1), seed=7, number="DE89370400440532013000", currency="EUR", opening=123456):
    """A person's year: salary, rent, subscriptions, shops, refunds, two equal coffees a day, transfers to own savings."""
    dice, rows = random.Random(seed), []
    for n in range(days):
        day = start + timedelta(n)
        today = [(amount, payee, text) for when, amount, payee, text in MONTHLY if when == day.day]
        if n == 0 or dice.random() < 0.7:
            payee, text, low, high = dice.choice(SHOPS)
            today.append((-dice.randint(low, high), payee, text))
        if day.weekday() == 4:  # two equal coffees on Fridays
            today += [(-350, "Café Größenwahn", "Kaffee, zum Mitnehmen")] * 2
        if n % 45 == 20:
            today.append((dice.randint(1000, 6000), "IKEA Deutschland", "Gutschrift Retoure Filiale 321"))
        rows += [(day, *row) for row in today]
    balance, entries = opening, []
    for n, (day, amount, payee, text) in enumerate(rows):
        balance += amount
        entries.append(Entry(day, amount, payee, text, f"{day:%y%m%d}{n:08d}", balance))
    return Account(number, currency, tuple(entries), opening, start, start + timedelta(days - 1))


def cut(account, first, last):
    """The same account as a statement of the days `first` to `last` only."""
    before = sum(e.amount for e in account.entries if e.day < first)
    kept = tuple(e for e in account.entries if first <= e.day <= last)
    return replace(account, entries=kept, opening=account.opening + before, opens=first, closes=last)


def decimal(minor, mark=".", group=""):
    """Minor units as decimal text with two places: `-1234.50`."""
    return f"{'-' * (minor < 0)}{f'{abs(minor) // 100:,}'.replace(',', group)}{mark}{abs(minor) % 100:02d}"


# --- CSV and XLSX -------------------------------------------------------------------------------------------------------

CSV_DIALECTS = ("plain", "german", "af_bij", "paid", "american", "utf16")


def csv_rows(account, dialect="plain"):
    """The cells of a CSV file of `account`, the line of names first; preamble lines are not among them."""
    money = {"german": lambda m: decimal(m, ",", "."), "af_bij": lambda m: decimal(abs(m), ",")}.get(dialect, decimal)
    rows = []
    for e in account.entries:
        if dialect in ("plain", "utf16"):
            rows.append([e.day.isoformat(), e.payee, e.text, money(e.amount), account.currency, e.id, money(e.balance)])
        elif dialect == "german":
            rows.append([f"{e.day:%d.%m.%Y}", e.payee, e.text, money(e.amount), account.currency, e.id, money(e.balance)])
        elif dialect == "af_bij":
            way = "Af" if e.amount < 0 else "Bij"
            saldo = decimal(e.balance, ",")
            rows.append([f"{e.day:%Y%m%d}", e.payee, account.number, "", "GT", way, money(e.amount), "Diversen", e.text, saldo, ""])
        elif dialect == "paid":
            out, into = (money(-e.amount), "") if e.amount < 0 else ("", money(e.amount))
            rows.append([f"{e.day:%d/%m/%Y}", e.payee, e.text, out, into, money(e.balance), account.currency, e.id])
        else:
            rows.append([f"{e.day:%m/%d/%Y}", e.payee, e.text, decimal(e.amount, ".", ","), account.currency, e.id, money(e.balance)])
    names = {
        "german": "Buchungstag;Empfänger;Verwendungszweck;Betrag;Währung;Referenz;Saldo",
        "af_bij": "Datum;Naam / Omschrijving;Rekening;Tegenrekening;Code;Af Bij;Bedrag (EUR);Mutatiesoort;Mededelingen;Saldo na mutatie;Tag",
        "paid": "Date;Payee;Description;Paid out;Paid in;Balance;Currency;Reference",
    }.get(dialect, "Date;Payee;Description;Amount;Currency;Reference;Balance")
    return [names.split(";"), *rows]


def write_csv(account, dialect="plain"):
    """A CSV file in one of `CSV_DIALECTS`: UTF-8 with commas; cp1252, `;`, a preamble, decimal commas; Af/Bij; and so on."""
    out = io.StringIO()
    if dialect == "german":
        out.write(f'"Konto";"{account.number}"\r\n"Zeitraum";"{account.opens:%d.%m.%Y} - {account.closes:%d.%m.%Y}"\r\n\r\n')
    delimiter = {"german": ";", "af_bij": ";", "utf16": "\t"}.get(dialect, ",")
    csv.writer(out, delimiter=delimiter).writerows(csv_rows(account, dialect))
    return out.getvalue().encode({"german": "cp1252", "utf16": "utf-16"}.get(dialect, "utf-8"))


def write_xlsx(account, typed=True):
    """A workbook with one sheet: dates and numbers as such, or (`typed=False`) all of it text."""
    import openpyxl

    book = openpyxl.Workbook()
    names, *rows = csv_rows(account)
    book.active.append(names)
    for row in rows:
        if typed:
            row[0], row[3], row[6] = date.fromisoformat(row[0]), float(row[3]), float(row[6])
        book.active.append(row)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


# --- OFX ----------------------------------------------------------------------------------------------------------------

OFX1_HEADER = "OFXHEADER:100\r\nDATA:OFXSGML\r\nVERSION:{}\r\nSECURITY:NONE\r\nENCODING:{}\r\nCHARSET:{}\r\nCOMPRESSION:NONE\r\nOLDFILEUID:NONE\r\nNEWFILEUID:NONE\r\n\r\n"
OFX2_HEADER = '<?xml version="1.0" encoding="UTF-8" standalone="no"?>\r\n<?OFX OFXHEADER="200" VERSION="{}" SECURITY="NONE" OLDFILEUID="NONE" NEWFILEUID="NONE"?>\r\n'


def ofx_tree(account, card=False, intuit=None):
    """The body of an OFX file as nested (tag, value or children) pairs."""
    kind, wrap = ("CREDITCARDMSGSRSV1", "CCSTMT") if card else ("BANKMSGSRSV1", "STMT")
    entries = [("STMTTRN", [
        ("TRNTYPE", "CREDIT" if e.amount > 0 else "DEBIT"), ("DTPOSTED", f"{e.day:%Y%m%d}120000.000[+1:CET]"),
        ("TRNAMT", decimal(e.amount)), ("FITID", e.id), ("NAME", e.payee), ("MEMO", e.text)]) for e in account.entries]
    holder = ("CCACCTFROM", [("ACCTID", account.number)]) if card else (
        "BANKACCTFROM", [("BANKID", "37040044"), ("ACCTID", account.number), ("ACCTTYPE", "CHECKING")])
    status = ("STATUS", [("CODE", "0"), ("SEVERITY", "INFO")])
    bank = [("INTU.BID", intuit)] if intuit else []
    return ("OFX", [
        ("SIGNONMSGSRSV1", [("SONRS", [status, ("DTSERVER", f"{account.closes:%Y%m%d}235959"), ("LANGUAGE", "ENG"), *bank])]),
        (kind, [(f"{wrap}TRNRS", [("TRNUID", "1"), status, (f"{wrap}RS", [
            ("CURDEF", account.currency), holder,
            ("BANKTRANLIST", [("DTSTART", f"{account.opens:%Y%m%d}"), ("DTEND", f"{account.closes:%Y%m%d}"), *entries]),
            ("LEDGERBAL", [("BALAMT", decimal(account.closing)), ("DTASOF", f"{account.closes:%Y%m%d}235959")])])])])])


def _sgml(node, closed):
    tag, inside = node
    if isinstance(inside, str):
        return f"<{tag}>{escape(inside, quote=False)}" + (f"</{tag}>" if closed else "") + "\r\n"
    return f"<{tag}>\r\n" + "".join(_sgml(child, closed) for child in inside) + f"</{tag}>\r\n"


def write_ofx1(account, encoding="cp1252", version="102", card=False, intuit=None):
    """OFX 1.x: SGML, leaves without end tags; the header says USASCII and 1252, or UTF-8 and NONE."""
    names = {"cp1252": ("USASCII", "1252"), "utf-8": ("UTF-8", "NONE")}[encoding]
    text = OFX1_HEADER.format(version, *names) + _sgml(ofx_tree(account, card, intuit), closed=False)
    return text.encode(encoding)


def write_ofx2(account, version="203", card=False):
    """OFX 2.x: XML in UTF-8."""
    return (OFX2_HEADER.format(version) + _sgml(ofx_tree(account, card), closed=True)).encode()


def write_qfx(account):
    """Quicken's kind of OFX 1: with the number of the bank at Intuit."""
    return write_ofx1(account, intuit="3000")


# --- CAMT.053 -----------------------------------------------------------------------------------------------------------


def write_camt053(account, version="001.08", previous=False):
    """CAMT.053 of a version from 001.02 to 001.08; the opening balance is OPBD, or (`previous`) PRCD of the day before."""
    new = version >= "001.04"
    opened = ("PRCD", account.opens - timedelta(1)) if previous else ("OPBD", account.opens)

    def amount(minor):
        return f'<Amt Ccy="{account.currency}">{decimal(abs(minor))}</Amt><CdtDbtInd>{"DBIT" if minor < 0 else "CRDT"}</CdtDbtInd>'

    def balance(code, day, minor):
        return f"<Bal><Tp><CdOrPrtry><Cd>{code}</Cd></CdOrPrtry></Tp>{amount(minor)}<Dt><Dt>{day}</Dt></Dt></Bal>"

    def party(role, name):
        inner = f"<Nm>{escape(name)}</Nm>"
        return f"<{role}>{f'<Pty>{inner}</Pty>' if version >= '001.08' else inner}</{role}>"

    def entry(e):
        mine, theirs = ("Dbtr", "Cdtr") if e.amount < 0 else ("Cdtr", "Dbtr")
        sides = sorted([party(mine, account.owner), party(theirs, e.payee)], key=lambda p: "<Cdtr>" in p)
        details = amount(e.amount) if new else f'<AmtDtls><TxAmt><Amt Ccy="{account.currency}">{decimal(abs(e.amount))}</Amt></TxAmt></AmtDtls>'
        return (f"<Ntry>{amount(e.amount)}<Sts>{'<Cd>BOOK</Cd>' if version >= '001.08' else 'BOOK'}</Sts>"
                f"<BookgDt><Dt>{e.day}</Dt></BookgDt><ValDt><Dt>{e.day}</Dt></ValDt><AcctSvcrRef>{e.id}</AcctSvcrRef>"
                "<BkTxCd><Prtry><Cd>NTRF+177</Cd></Prtry></BkTxCd><NtryDtls><TxDtls><Refs><EndToEndId>NOTPROVIDED</EndToEndId></Refs>"
                f"{details}<RltdPties>{''.join(sides)}</RltdPties><RmtInf><Ustrd>{escape(e.text)}</Ustrd></RmtInf></TxDtls></NtryDtls></Ntry>\n")

    return (f'<?xml version="1.0" encoding="UTF-8"?>\n<Document xmlns="urn:iso:std:iso:20022:tech:xsd:camt.053.{version}"><BkToCstmrStmt>'
            f"<GrpHdr><MsgId>M1</MsgId><CreDtTm>{account.closes}T23:59:59</CreDtTm></GrpHdr><Stmt><Id>S1</Id>"
            f"<CreDtTm>{account.closes}T23:59:59</CreDtTm><Acct><Id><IBAN>{account.number}</IBAN></Id><Ccy>{account.currency}</Ccy></Acct>\n"
            f"{balance(*opened, account.opening)}{balance('CLBD', account.closes, account.closing)}\n"
            f"{''.join(map(entry, account.entries))}</Stmt></BkToCstmrStmt></Document>\n").encode()


# --- MT940 --------------------------------------------------------------------------------------------------------------


def write_mt940(account, encoding="utf-8", daily=False):
    """MT940 as German banks write it, :86: with ?-fields; `daily` gives one message a day with entries instead of one in all."""
    days = sorted({e.day for e in account.entries}) if daily else [account.closes]
    out, opening, before = [], account.opening, account.opens - timedelta(1)
    for number, day in enumerate(days, start=1):
        entries = [e for e in account.entries if before < e.day <= day]
        closing = opening + sum(e.amount for e in entries)
        out += [":20:STARTUMS", f":25:{account.number}", f":28C:{number:05d}/001", f":60F:{_mt_balance(before, opening, account.currency)}"]
        for e in entries:
            out.append(f":61:{e.day:%y%m%d}{e.day:%m%d}{'D' if e.amount < 0 else 'C'}R{decimal(abs(e.amount), ',')}NTRFNONREF//{e.id}")
            purpose = [f"?{n}{piece}" for n, piece in zip(range(20, 30), _pieces(f"SVWZ+{e.text}", 27), strict=False)]
            names = [f"?{n}{piece}" for n, piece in zip((32, 33), _pieces(e.payee, 27), strict=False)]
            fields = "".join(["177?00ÜBERWEISUNG?109251", *purpose, "?30COBADEFFXXX?31DE02120300000000202051", *names])
            out += [f":86:{fields[:61]}", *_pieces(fields[61:], 65)]
        out += [f":62F:{_mt_balance(day, closing, account.currency)}", "-"]
        opening, before = closing, day
    return ("\r\n".join(out) + "\r\n").encode(encoding)


def _mt_balance(day, minor, currency):
    return f"{'D' if minor < 0 else 'C'}{day:%y%m%d}{currency}{decimal(abs(minor), ',')}"


def _pieces(text, width):
    return [text[i : i + width] for i in range(0, len(text), width)]


# --- QIF ----------------------------------------------------------------------------------------------------------------


def write_qif(account, order="mdy", encoding="cp1252", opening=True):
    """QIF; dates are Quicken's own (`mdy`: 1/ 2'25), day first (`dmy`: 02/01/2025) or `ymd`."""

    def written(day):
        return {"mdy": f"{day.month}/{day.day:2d}'{day:%y}", "dmy": f"{day:%d/%m/%Y}", "ymd": day.isoformat()}[order]

    out = ["!Account", f"N{account.number}", "TBank", "^", "!Type:Bank"]
    if opening:
        out += [f"D{written(account.opens)}", f"T{decimal(account.opening, '.', ',')}", "CX", "POpening Balance", f"L[{account.number}]", "^"]
    for e in account.entries:
        out += [f"D{written(e.day)}", f"T{decimal(e.amount, '.', ',')}", f"P{e.payee}", f"M{e.text}", "^"]
    return ("\r\n".join(out) + "\r\n").encode(encoding)


# --- Plaid --------------------------------------------------------------------------------------------------------------


def plaid_pages(account, pages=1):
    """The responses of /transactions/sync, in order; money out is positive there."""
    holder = {"account_id": "acc-1", "mask": account.number[-4:], "name": "Girokonto", "type": "depository", "subtype": "checking",
              "balances": {"current": account.closing / 100, "available": None, "iso_currency_code": account.currency}}
    size, found = -(-len(account.entries) // pages), []
    for n in range(pages):
        added = [{
            "transaction_id": e.id, "account_id": "acc-1", "amount": -e.amount / 100, "iso_currency_code": account.currency,
            "unofficial_currency_code": None, "date": e.day.isoformat(), "authorized_date": None, "pending": False,
            "pending_transaction_id": None, "name": e.text, "merchant_name": e.payee, "payment_channel": "in store",
            "personal_finance_category": {"primary": "INCOME" if e.amount > 0 else "GENERAL_MERCHANDISE", "detailed": None},
        } for e in account.entries[n * size : (n + 1) * size]]
        found.append({"accounts": [holder], "added": added, "modified": [], "removed": [], "next_cursor": f"c{n}", "has_more": n < pages - 1,
                      "request_id": f"r{n}", "transactions_update_status": "HISTORICAL_UPDATE_COMPLETE"})
    return found


def write_plaid(account, pages=1):
    """The JSON of /transactions/sync: one response, or a list of several `pages`."""
    found = plaid_pages(account, pages)
    return json.dumps(found if pages > 1 else found[0], ensure_ascii=False, indent=1).encode()


WRITERS = {"csv": write_csv, "xlsx": write_xlsx, "ofx1": write_ofx1, "ofx2": write_ofx2, "qfx": write_qfx,
           "camt053": write_camt053, "mt940": write_mt940, "qif": write_qif, "plaid": write_plaid}
