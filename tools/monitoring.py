"""Write deploy/: the alerting rules and the dashboard of fincoach.api.metrics, as Prometheus and Grafana read them.

`python tools/monitoring.py` writes; with `--check` it only says what would change (exit status 1).
"""

import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fincoach.api.metrics import alert_rules, dashboard  # noqa: E402

HEAD = "# Written by tools/monitoring.py from nbs/api/metrics.ipynb: edit there.\n"
SCRAPE = {"scrape_configs": [{"job_name": "fincoach", "scrape_interval": "15s", "metrics_path": "/metrics", "static_configs": [{"targets": ["127.0.0.1:8000"]}]}],
          "rule_files": ["alerts.yml"]}


def files() -> dict[Path, str]:
    """Every file below deploy/ with its content."""
    folder = ROOT / "deploy"
    return {folder / "prometheus/alerts.yml": HEAD + yaml.safe_dump(alert_rules(), sort_keys=False, width=120),
            folder / "prometheus/prometheus.yml": HEAD + yaml.safe_dump(SCRAPE, sort_keys=False),
            folder / "grafana/fincoach.json": json.dumps(dashboard(), indent=1) + "\n"}


if __name__ == "__main__":
    stale = [p for p, text in files().items() if not p.exists() or p.read_text("utf-8") != text]
    if "--check" not in sys.argv:
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files()[path], "utf-8")
    print("\n".join(p.relative_to(ROOT).as_posix() for p in stale) or "deploy/ is up to date")
    sys.exit(bool(stale) and "--check" in sys.argv)
