for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") !== "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => Number(row.cells[column].dataset.v);
    const sign = descending ? -1 : 1;
    const rows = [...table.tBodies[0].rows].sort((a, b) => sign * (value(a) - value(b)));
    table.tBodies[0].append(...rows);
  }));
}
const heat = document.getElementById("heat");
heat?.addEventListener("change", () => {
  for (const row of document.querySelectorAll("tr.counted")) {
    row.style.setProperty("--heat", row.dataset.heat.split(",")[heat.value]);
  }
});
