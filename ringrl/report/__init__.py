"""The report: evaluation results as one DataFrame, and the page, charts and tables made from it.

`read_results` reads results into a pandas DataFrame, `tabulate` converts records, and `write_report` makes the page.
"""

from ringrl.errors import UserError

try:
    from ringrl.report.page import terminal_table, write_report
    from ringrl.report.results import read_results, tabulate
except ModuleNotFoundError as error:
    raise UserError(f"report: needs {error.name}; install it with: pip install 'ringrl[report]'") from error

__all__ = ["read_results", "tabulate", "terminal_table", "write_report"]
