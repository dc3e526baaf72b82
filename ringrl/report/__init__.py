"""The report: evaluation results as one DataFrame, and the page, charts and tables made from it.

`read_results` reads results into a pandas DataFrame, and `tabulate` converts records. `write_report` makes the page,
and `write_comparison` the page of the differences between two sets of results.
"""

from ringrl.errors import UserError

try:
    from ringrl.report.comparison import write_comparison
    from ringrl.report.page import terminal_table, write_report
    from ringrl.report.results import read_results, tabulate
except ModuleNotFoundError as error:
    raise UserError(f"report: needs {error.name}; install it with: pip install 'ringrl[report]'") from error

__all__ = ["read_results", "tabulate", "terminal_table", "write_comparison", "write_report"]
