// A click on a heading sorts by that column: numbers as numbers, absent values last, ties in their order.
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

const views = [];
let isolated = "";
const draw = async (figure) => {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const options = { renderer: "svg", actions: false, tooltip: { disableDefaultStyle: true, id: "tooltip" } };
  const { view } = await window.vegaEmbed(figure.querySelector(".chart"), spec, options);
  views.push(view);
  if (isolated) view.signal("isolated", isolated).run();
};
Promise.all([...document.querySelectorAll("figure:has(.chart)")].map(draw)).then(() => { document.body.dataset.drawn = views.length; });

// A click on a method in a legend fades all other methods in all charts; a second click shows all again.
const keys = [...document.querySelectorAll("button.key")];
for (const button of keys) button.addEventListener("click", () => {
  isolated = isolated === button.dataset.method ? "" : button.dataset.method;
  for (const key of keys) key.ariaPressed = String(key.dataset.method === isolated);
  for (const view of views) view.signal("isolated", isolated).run();
});
