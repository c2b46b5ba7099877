// Runs the page's script under Node, with as much of a document as it uses, against a service: node page_in_node.js URL FILE STEPS
// STEPS: a JSON list of [what, id, value]. Prints the document after each "show" as JSON. Markup set from a script is an error.
"use strict";
const fs = require("fs");
const [url, folder, steps] = process.argv.slice(2);

class Element {
  constructor(tag, id) {
    this.tag = tag; this.id = id; this.children = []; this.text = ""; this.value = ""; this.hidden = false; this.disabled = false;
    this.className = ""; this.dataset = {}; this.attributes = {}; this.listeners = {}; this.styles = {};
    this.style = { setProperty: (name, value) => { this.styles[name] = value; } };
    this.classList = { toggle: (name, on) => { this.className = on ? name : ""; } };
  }
  set innerHTML(_) { throw new Error("innerHTML is set"); }
  set outerHTML(_) { throw new Error("outerHTML is set"); }
  insertAdjacentHTML() { throw new Error("insertAdjacentHTML is called"); }
  get textContent() { return this.text + this.children.map((child) => child.textContent).join(""); }
  set textContent(text) { this.text = String(text); this.children = []; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.text = ""; this.children = children; }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(name, listener) { (this.listeners[name] ||= []).push(listener); }
  fire(name, event = {}) {
    for (const listener of this.listeners[name] || []) listener({ preventDefault() {}, target: this, submitter: null, ...event });
  }
  reportValidity() { return true; }
  focus() { document.focused = this.id; }
  closest(selector) { return selector.split(", ").includes(this.tag) ? this : null; }
  all() { return [this, ...this.children.flatMap((child) => child.all())]; }
  shown() {
    const found = { tag: this.tag };
    if (this.children.length) found.children = this.children.map((child) => child.shown()); else found.text = this.text;
    for (const name of ["className", "hidden", "disabled"]) if (this[name]) found[name] = this[name];
    if (Object.keys(this.styles).length) found.styles = this.styles;
    return found;
  }
}

const ids = {};
const models = [];
const html = fs.readFileSync(`${folder}/index.html`, "utf8");
for (const [, tag, rest] of html.matchAll(/<(\w+)([^>]*\bid="[^"]*"[^>]*)>/g)) {
  const id = /\bid="([^"]*)"/.exec(rest)[1];
  ids[id] = new Element(tag, id);
  ids[id].hidden = /\bhidden\b/.test(rest);
  if (/class="models"/.test(rest)) models.push(ids[id]);
}
const root = new Element("html");
const store = {};
globalThis.document = {
  getElementById: (id) => { if (!ids[id]) throw new Error(`no element ${id}`); return ids[id]; },
  createElement: (tag) => new Element(tag), querySelectorAll: (selector) => { if (selector !== ".models") throw new Error(selector); return models; },
  documentElement: root, addEventListener: (name, listener) => root.addEventListener(name, listener),
};
globalThis.sessionStorage = { getItem: (name) => store[name] ?? null, setItem: (name, value) => { store[name] = value; } };
globalThis.matchMedia = () => ({ matches: false });
let open = 0;
const reach = globalThis.fetch;
globalThis.fetch = async (path, options) => {
  open += 1;
  try { return await reach(url + path, options); } finally { open -= 1; }
};

async function settled() {
  for (let quiet = 0; quiet < 10;) {
    await new Promise((done) => setTimeout(done, 20));
    quiet = open ? 0 : quiet + 1;
  }
}

(async () => {
  require("vm").runInThisContext(fs.readFileSync(`${folder}/page.js`, "utf8"));
  await settled();
  for (const [what, id, value] of JSON.parse(steps)) {
    if (what === "type") { ids[id].value = value; ids[id].fire("input"); }
    else if (what === "click") ids[id].fire("click");
    else if (what === "submit") ids[id].fire("submit", { submitter: new Element("button") });
    else if (what === "key") root.fire("keydown", { key: value, target: ids[id] || new Element("body") });
    else if (what === "press") ids[id].all().find((one) => one.tag === "button" && one.textContent.startsWith(value)).fire("click");
    else if (what === "show") {
      const shown = Object.fromEntries(Object.entries(ids).map(([name, one]) => [name, one.shown()]));
      console.log(JSON.stringify({ ids: shown, theme: root.dataset.theme, focused: document.focused }));
    }
    await settled();
  }
})().catch((error) => { console.error(error); process.exit(1); });
