"""The outcome of a sweep: the reports of all settings, and what they cost together."""

import json
from dataclasses import dataclass, field

from wanda_fast.report.contents import Report


@dataclass
class Sweep:
    """The outcome of `wanda_fast.sweep`.

    Attributes:
        reports: by the setting's name, such as "wanda 2:4" or "wanda unstructured 0.5". Each is the report
            of the single run with this setting, but for `seconds`, which are those of its own steps.
        seconds: by phase, of the steps that the settings share.
    """

    reports: dict[str, Report]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def first(self) -> Report:
        """A report that says what is the same in all of them: calibration, resources, the dense model."""
        return next(iter(self.reports.values()))

    @property
    def all_seconds(self) -> float:
        own = sum(sum(report.seconds.values()) for report in self.reports.values())
        return own + sum(self.seconds.values())

    def to_json(self) -> str:
        reports = {name: json.loads(report.to_json()) for name, report in self.reports.items()}
        return json.dumps({"seconds": self.seconds, "reports": reports}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Sweep":
        """Read what `to_json` wrote."""
        content = json.loads(text)
        reports = {name: Report.from_json(json.dumps(each)) for name, each in content["reports"].items()}
        return cls(reports, content["seconds"])
