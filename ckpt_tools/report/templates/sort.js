"use strict";
// A click on a head sorts its table: once up, once more down. What has no value stays last.
const announcement = document.getElementById("announcement");

function key(row, column) {
  const cell = row.cells[column];
  const order = cell.dataset.order;
  if (order === undefined) return cell.textContent.trim();
  return order === "" ? null : Number(order);
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sort(head) {
  const table = head.closest("table"), body = table.tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  const rows = Array.from(body.rows, (row) => [key(row, head.cellIndex), row]);
  const known = rows.filter(([value]) => value !== null);
  known.sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
  body.append(...known.map(([, row]) => row), ...rows.filter(([value]) => value === null).map(([, row]) => row));
  for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  announcement.textContent = `Sorted by ${head.textContent.trim()}, ${down ? "descending" : "ascending"}.`;
}

for (const button of document.querySelectorAll("th > button")) {
  button.disabled = false;
  button.addEventListener("click", () => sort(button.parentElement));
}
