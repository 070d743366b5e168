"""A page on one run, or on several side by side: one HTML file that needs no network.

`assets/page.html` is a template for jinja2, which escapes all that it is given. `assets/page.js` draws the
charts with Chart.js (`chart.umd.min.js`, MIT licence), the heat map, and the table of weights.
"""

import json
from pathlib import Path

from wanda_fast.report import facts
from wanda_fast.report.charts import charts
from wanda_fast.report.command import repeat_command
from wanda_fast.report.measures import measures
from wanda_fast.report.weights import columns

ASSETS = Path(__file__).with_name("assets")


def page(contents: dict[str, dict]) -> str:
    """The page's HTML.

    Args:
        contents: the reports as their JSON holds them, by the names that the page calls the runs.
    """
    # torch requires jinja2; most runs write no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    runs = [
        {"label": label, "content": content, "weights": columns(content["linears"])}
        for label, content in contents.items()
    ]
    drawn = charts(runs)
    data = {
        "charts": drawn,
        "runs": [{"label": run["label"], **run["weights"]} for run in runs if run["content"]["linears"]],
    }
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=facts.title(runs),
        runs=runs,
        facts=facts,
        measures=measures,
        command=repeat_command,
        charts=drawn,
        data=_in_script(data),
        style=_asset("page.css"),
        scripts=[_asset("chart.umd.min.js"), _asset("page.js")],
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _in_script(data: dict) -> str:
    """JSON that can stand in a <script>: no tag or comment begins or ends in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
