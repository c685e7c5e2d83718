// Elements. Text of the data only ever becomes text.
type Child = Node | string | number | null | undefined;

export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Record<string, unknown> = {},
  ...children: (Child | Child[])[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value as EventListener);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.flat().filter((child): child is Node | string => child !== null && child !== undefined).map(asNode));
  return element;
}

function asNode(child: Node | string | number): Node | string {
  return child instanceof Node ? child : String(child);
}

export function table(columns: string[], rows: Child[][], caption?: string): HTMLElement {
  const head = h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col" }, name))));
  const body = h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))));
  return h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": caption ?? columns.join(", ") },
    h("table", {}, caption ? h("caption", {}, caption) : null, head, body));
}
