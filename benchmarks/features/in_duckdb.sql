-- The 28 numbers in DuckDB. $day is the day asked about; `input` are the rows, `kinds` says each category's kind (0 income, 1 essential,
-- 2 discretionary, 3 saving, 4 debt, 5 fee, 6 transfer). Everybody is in UTC, in one currency, and known for at least 182 days.
WITH r AS MATERIALIZED (
  SELECT user_id AS u, $day - (epoch_us(occurred_at) // 86400000000) AS ago,
    (epoch_us(occurred_at) // 60000000) AS tick, category_id AS c, kind AS k, amount_minor AS a,
    kind IN (1, 2, 4, 5) AS spends
  FROM input JOIN kinds USING (category_id)
  WHERE epoch_us(occurred_at) < ($day + 1) * 86400000000
),
once AS (
  SELECT u,
    sum(a) FILTER (k = 0 AND a > 0 AND ago < 84)::DOUBLE AS earned,
    greatest(-sum(a) FILTER (spends AND ago < 84), 0)::DOUBLE AS spent,
    greatest(-coalesce(sum(a) FILTER (spends AND ago < 7), 0), 0)::DOUBLE AS spent7,
    greatest(-coalesce(sum(a) FILTER (spends AND ago < 28), 0), 0)::DOUBLE AS spent28,
    greatest(-coalesce(sum(a) FILTER (spends AND ago >= 28 AND ago < 84), 0), 0)::DOUBLE AS before28,
    -coalesce(sum(a) FILTER (k = 1 AND ago < 84), 0)::DOUBLE AS essential,
    -coalesce(sum(a) FILTER (k IN (4, 5) AND ago < 84), 0)::DOUBLE AS owed,
    -coalesce(sum(a) FILTER (k = 3 AND ago < 84), 0)::DOUBLE AS saved,
    -sum(a) FILTER (spends AND a < 0 AND ago < 84)::DOUBLE AS gross,
    coalesce(sum(a) FILTER (spends AND a > 0 AND ago < 84), 0)::DOUBLE AS back,
    min(ago) FILTER (k = 0 AND a > 0) AS since_income,
    min(ago) FILTER (spends AND a < 0) AS since_purchase,
    coalesce(sum(a) FILTER (k <> 3), 0)::DOUBLE AS kept,
    coalesce(sum(a) FILTER (ago >= 84), 0) AS carried
  FROM r GROUP BY u
),
visit AS (SELECT u, tick, first(ago) AS ago, -sum(a) AS a FROM r WHERE spends AND a < 0 AND ago < 84 GROUP BY u, tick),
visits AS (
  SELECT u, count(*) AS bought, median(a) AS typical, count(*) FILTER (($day - ago + 3) % 7 >= 5) AS weekend,
    count(*) FILTER (tick % 1440 >= 1080 OR tick % 1440 < 360) AS evening
  FROM visit GROUP BY u
),
large AS (SELECT u, sum(a)::DOUBLE AS large FROM visit JOIN visits USING (u) WHERE a > 5 * typical GROUP BY u),
mix AS (
  SELECT u, c, greatest(-coalesce(sum(a) FILTER (ago < 84), 0), 0)::DOUBLE AS now,
    greatest(-coalesce(sum(a) FILTER (ago >= 84), 0), 0)::DOUBLE AS earlier
  FROM r WHERE spends AND ago < 168 GROUP BY u, c
),
whole AS (SELECT u, sum(now) AS now FROM mix GROUP BY u),
spread AS (
  SELECT u, -sum(CASE WHEN m.now > 0 THEN m.now / w.now * ln(m.now / w.now) ELSE 0 END) / ln(18) AS diversity,
    CASE WHEN sum(m.now) > 0 AND sum(earlier) > 0
      THEN least(sum(m.now * earlier) / sqrt(sum(m.now ** 2)) / sqrt(sum(earlier ** 2)), 1) END AS stability
  FROM mix m JOIN whole w USING (u) GROUP BY u
),
weeks AS (SELECT u, ago // 7 AS week, -sum(a)::DOUBLE AS s FROM r WHERE spends AND ago < 182 GROUP BY u, week),
volatility AS (
  SELECT u, CASE WHEN sum(s) > 0 THEN least(sqrt(greatest(sum(s * s) / 26 - (sum(s) / 26) ** 2, 0)) / (sum(s) / 26), 5) END AS volatility
  FROM weeks GROUP BY u
),
periods AS (
  SELECT u, c, ago // 28 AS period, greatest(-sum(a), 0)::DOUBLE AS s FROM r WHERE spends AND ago < 168 GROUP BY u, c, period
),
evenness AS (
  SELECT u, c, sum(s) / 6 AS mean, sqrt(greatest(sum(s * s) / 6 - (sum(s) / 6) ** 2, 0)) AS sd FROM periods GROUP BY u, c
),
budget AS (SELECT u, least(greatest(1 - sum(sd) / (sum(mean) * sqrt(5)), 0), 1) AS budget FROM evenness GROUP BY u HAVING sum(mean) > 0),
fun AS (SELECT u, ago, tick, a FROM r WHERE k = 2 AND a < 0 AND ago < 84),
near_others AS (
  SELECT u, tick, tick - lag(tick) OVER w AS since, lead(tick) OVER w - tick AS until
  FROM (SELECT DISTINCT u, tick FROM fun) WINDOW w AS (PARTITION BY u ORDER BY tick)
),
impulse AS (
  SELECT u, avg((coalesce(since <= 90, false) OR coalesce(until <= 90, false) OR tick % 1440 >= 1380 OR tick % 1440 < 300)::INT) AS impulse
  FROM near_others GROUP BY u
),
pleasure AS (SELECT u, -sum(a)::DOUBLE AS fun FROM fun GROUP BY u),
largest AS (SELECT u, max(a) AS largest FROM r WHERE k = 0 AND a > 0 AND ago < 90 GROUP BY u),
near AS (
  SELECT DISTINCT u, ago - step AS ago FROM r JOIN largest USING (u), range(7) AS t(step)
  WHERE k = 0 AND ago < 90 AND 2 * a >= largest AND ago - step BETWEEN 0 AND 83
),
covered AS (SELECT u, count(*) AS covered FROM near GROUP BY u),
after AS (SELECT u, -sum(a)::DOUBLE AS after FROM fun JOIN near USING (u, ago) GROUP BY u),
daily AS (SELECT u, ago, sum(a) AS a FROM r WHERE ago < 84 GROUP BY u, ago),
balance AS (
  SELECT u, sum(coalesce(a, 0)) OVER (PARTITION BY u ORDER BY ago DESC) AS moved
  FROM (SELECT u, ago FROM once, range(84) AS t(ago)) LEFT JOIN daily USING (u, ago)
),
low AS (
  SELECT u, avg((opening + carried + moved < spent / 12)::INT) AS low FROM balance JOIN once USING (u) JOIN people USING (u) GROUP BY u
),
put AS (SELECT goal, sum(a)::DOUBLE AS put FROM puts WHERE day <= $day GROUP BY goal),
goal AS (
  SELECT u, avg(greatest(least(coalesce(put, 0) / target, 1), 0)) AS progress,
    sum(greatest(target - coalesce(put, 0), 0) / greatest((due - $day) / 7, 1)) AS need
  FROM goals LEFT JOIN put USING (goal) WHERE start <= $day AND ending > $day GROUP BY u
),
ends AS (SELECT DISTINCT u, $day - 28 * step AS day FROM goals, range(6) AS t(step) WHERE start <= $day - 28 * step AND ending > $day - 28 * step),
adherence AS (
  SELECT u, avg(kept::INT) AS adherence FROM (
    SELECT e.u, e.day, count(p.goal) > 0 AS kept FROM ends e
    LEFT JOIN (SELECT g.u, p.* FROM puts p JOIN goals g USING (goal) WHERE p.a > 0 AND p.day <= $day) p
      ON p.u = e.u AND p.day > e.day - 28 AND p.day <= e.day
    GROUP BY e.u, e.day) GROUP BY u
)
SELECT u AS user_id,
  CASE WHEN since_income IS NOT NULL THEN coalesce(earned, 0) / 1200 END AS income_weekly, spent / 1200 AS spending_weekly,
  CASE WHEN spent > 0 THEN least(spent7 / (spent / 12), 12) END AS spending_pace,
  CASE WHEN earned > 0 THEN greatest(least((earned - spent) / earned, 1), -1) END AS savings_rate,
  CASE WHEN spent > 0 THEN greatest(least(ln((spent28 / 4 + spent / 120) / (before28 / 8 + spent / 120)), 3), -3) END AS spending_trend,
  CASE WHEN spent > 0 THEN greatest(least(essential / spent, 1), 0) END AS essential_share,
  CASE WHEN spent > 0 THEN greatest(least(owed / spent, 1), 0) END AS debt_share,
  CASE WHEN earned > 0 THEN greatest(least(saved / earned, 1), -1) END AS saved_share,
  diversity AS category_diversity, coalesce(bought, 0) / 12 AS transactions_weekly, typical / 100 AS typical_purchase,
  CASE WHEN bought > 0 THEN coalesce(large, 0) / gross END AS large_purchase_share,
  CASE WHEN bought > 0 THEN least(back / gross, 1) END AS refund_share,
  CASE WHEN since_income IS NOT NULL THEN least(since_income, 364)::DOUBLE END AS days_since_income,
  CASE WHEN opening + kept <= 0 THEN 0 WHEN spent > 0 THEN least((opening + kept) / (spent / 12), 104) ELSE 104 END AS reserve_weeks,
  progress AS goal_progress, $month AS month_position, volatility AS spending_volatility, impulse AS impulse_share,
  stability AS category_stability, budget AS budget_discipline,
  CASE WHEN bought > 0 THEN weekend / bought END AS weekend_share, CASE WHEN bought > 0 THEN evening / bought END AS evening_share,
  CASE WHEN covered > 0 AND fun > 0 THEN least(coalesce(after, 0) / fun / (covered / 84), 12) END AS payday_effect,
  CASE WHEN since_purchase IS NOT NULL THEN least(since_purchase, 364)::DOUBLE END AS days_since_purchase, adherence AS goal_adherence,
  CASE WHEN earned > 0 AND need IS NOT NULL THEN least(need / (earned / 12), 5) END AS goal_pressure,
  low AS low_balance_share
FROM once JOIN people USING (u) LEFT JOIN visits USING (u) LEFT JOIN large USING (u) LEFT JOIN spread USING (u) LEFT JOIN volatility USING (u)
  LEFT JOIN budget USING (u) LEFT JOIN impulse USING (u) LEFT JOIN pleasure USING (u) LEFT JOIN covered USING (u) LEFT JOIN after USING (u) LEFT JOIN low USING (u)
  LEFT JOIN goal USING (u) LEFT JOIN adherence USING (u)
ORDER BY u
