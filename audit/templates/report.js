// The page reads without this: it sorts tables, and shows a feature's card where it is named.
const close = document.createElement("button"), shown = document.createElement("dialog");
close.textContent = "close";
close.onclick = () => shown.close();
shown.onclick = event => { if (event.target === shown) shown.close(); };
document.body.append(shown);

function show(note, features) {
  shown.replaceChildren(close);
  if (note) shown.append(Object.assign(document.createElement("pre"), { textContent: note }));
  for (const k of features) {
    const card = document.getElementById("f" + k);
    if (!card) continue;
    const copy = card.cloneNode(true);
    copy.removeAttribute("id");
    shown.append(copy);
  }
  shown.showModal();
}

document.addEventListener("click", event => {
  const link = event.target.closest("a.f"), token = event.target.closest("i[data-f]");
  const title = event.target.closest("th.by");
  if (link) {
    event.preventDefault();
    show("", [link.textContent]);
  } else if (token) {
    show(token.dataset.t, token.dataset.f.split(" "));
  } else if (title) {
    sort(title);
  }
});

// By the first number in a cell, largest first; by text where there is none. Again: reversed.
function sort(title) {
  const body = title.closest("table").tBodies[0], i = title.cellIndex;
  const number = row => parseFloat(row.cells[i].textContent.replace(/,/g, "").replace("−", "-"));
  const text = row => row.cells[i].textContent;
  const rows = [...body.rows].sort((a, b) =>
    number(b) - number(a) || text(a).localeCompare(text(b)));
  if (title.dataset.sorted) rows.reverse();
  title.dataset.sorted = title.dataset.sorted ? "" : "1";
  body.append(...rows);
}
for (const title of document.querySelectorAll("table.sorts th")) title.classList.add("by");
