// A click on a heading sorts by that column: numbers as numbers, what is absent last, ties as they were.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const key = (row) => row.cells[column].dataset.value;
    const present = [...body.rows].map(key).filter((value) => value !== "");
    const numeric = present.every((value) => !Number.isNaN(Number(value)));
    const descending = heading.ariaSort === "none" ? numeric : heading.ariaSort === "ascending";
    const compare = (a, b) => {
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
      const order = numeric ? key(a) - key(b) : key(a).localeCompare(key(b));
      return descending ? -order : order;
    };
    for (const other of headings) other.ariaSort = "none";
    heading.ariaSort = descending ? "descending" : "ascending";
    body.append(...[...body.rows].sort(compare));
  }));
}
