"""The report: evaluation results as one pandas DataFrame, and the page, charts and tables made from it."""

from ringrl.errors import UserError

try:
    from ringrl.report.page import terminal_table, write_report
    from ringrl.report.results import read_results, tabulate
except ModuleNotFoundError as error:
    raise UserError(f"report: needs {error.name}; install it with: pip install 'ringrl[report]'") from error

__all__ = ["read_results", "tabulate", "terminal_table", "write_report"]
