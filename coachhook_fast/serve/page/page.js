// The page of coachhook serve. Whatever comes from facts, models or people is set as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
let batches = [];

// ------------------------------------------------------------------ talking to the service

function token() {
  try { return sessionStorage.getItem("token"); } catch { return null; }
}

async function call(path, body, method = body === undefined ? "GET" : "POST") {
  const headers = {};
  if (token()) headers.Authorization = `Bearer ${token()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const reply = await fetch(path, {
    method, headers, body: body === undefined ? undefined : JSON.stringify(body),
  });
  const answer = await reply.json();
  if (reply.status === 401) $("enter").hidden = false;
  if (!reply.ok) throw new Error(answer.error ? answer.error.message : `status ${reply.status}`);
  return answer;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// Runs `work` with `button` out of reach meanwhile, and says what came of it.
async function doing(button, text, work) {
  if (button) button.disabled = true;
  say(`${text} …`);
  try {
    say((await work()) || "");
  } catch (error) {
    say(error.message, true);
  } finally {
    if (button) button.disabled = false;
  }
}

// ------------------------------------------------------------------ showing text

// What has no shape of its own, or turns others around, is shown as an escape.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

function visible(text, keep = "") {
  return String(text ?? "").replace(UNSEEN, (sign) => sign === keep ? sign : sign === "\n" ? "\\n" : `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = visible(text);
  if (className) made.className = className;
  return made;
}

function cell(row, head, text, className) {
  const made = element("td", text, className);
  made.dataset.head = head;
  row.append(made);
  return made;
}

// ------------------------------------------------------------------ facts

async function reload() {
  const ledger = await call("/edits");
  batches = ledger.batches;
  $("version").textContent = visible(ledger.version);
  showFacts();
}

function matches(fact, batch, wanted) {
  const told = [fact.text, fact.subject, fact.target_new, fact.state, fact.answer, batch.id, batch.time].join("\n");
  return told.toLowerCase().includes(wanted);
}

function showFacts() {
  const wanted = $("search").value.trim().toLowerCase();
  const rows = [];
  for (const batch of [...batches].reverse()) {
    let first = true;
    for (const fact of batch.edits) {
      if (wanted && !matches(fact, batch, wanted)) continue;
      const row = element("tr");
      cell(row, "Fact", fact.text);
      cell(row, "New answer", fact.target_new);
      cell(row, "State", fact.state, fact.state.replaceAll(" ", "-"));
      cell(row, "Model said", fact.answer);
      cell(row, "Date", batch.time.replace("T", " ").slice(0, 16));
      const last = cell(row, "Batch", first ? `${batch.id} ` : "");
      if (first) last.append(undoButton(batch));
      if (batch.edits.length > 1) last.append(removeButton(batch, fact));
      first = false;
      rows.push(row);
    }
  }
  $("ledger").replaceChildren(...rows);
  $("count").textContent = `(${rows.length})`;
  $("none").hidden = rows.length > 0;
}

// Two presses: the first asks.
function askingButton(text, question, label, work) {
  const button = element("button", text);
  button.type = "button";
  button.setAttribute("aria-label", label);
  let asked = 0;
  button.addEventListener("click", () => {
    if (Date.now() - asked > 5000) {
      asked = Date.now();
      button.textContent = question;
      button.setAttribute("aria-label", `${label}: sure?`);
      return;
    }
    doing(button, text, work);
  });
  return button;
}

const path = (batch) => `/edits/${encodeURIComponent(batch.id)}`;

function undoButton(batch) {
  const label = `Undo batch ${visible(batch.id)} of ${batch.edits.length} facts`;
  return askingButton("Undo", `Undo ${batch.edits.length}: sure?`, label, async () => {
    await call(`${path(batch)}/rollback`, {});
    await reload();
    return `Undone: batch ${visible(batch.id)}`;
  });
}

function removeButton(batch, fact) {
  return askingButton("Remove", "Remove this: sure?", `Remove ${visible(fact.text)}`, async () => {
    await call(`${path(batch)}/${fact.index}`, undefined, "DELETE");
    await reload();
    return `Removed: ${visible(fact.text)}`;
  });
}

// ------------------------------------------------------------------ adding

const lines = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);

function fact() {
  return {
    prompt: $("prompt").value, subject: $("subject").value, target_new: $("target").value,
    paraphrases: lines("paraphrases"), keep: lines("keep"),
  };
}

async function preview() {
  const found = await call("/edits/preview", { edits: [fact()], questions: lines("questions") });
  const outcome = found.edits[0];
  $("outcome").textContent = visible(`${outcome.state}, the model says “${outcome.answer}”`);
  $("answers").replaceChildren(...found.answers.map((answer) => {
    const row = element("tr");
    cell(row, "Kind", answer.kind);
    cell(row, "Prompt", answer.prompt);
    cell(row, "Before", answer.before);
    cell(row, "After", answer.after, answer.changed ? "changed" : "");
    return row;
  }));
  $("previewed").hidden = false;
  return `Tried in ${found.seconds.toFixed(1)} s; nothing was changed`;
}

async function commit() {
  const batch = await call("/edits", { edits: [fact()] });
  await reload();
  $("previewed").hidden = true;
  return `Added: ${visible(batch.edits[0].text)} → ${visible(batch.edits[0].target_new)} (${batch.edits[0].state})`;
}

// ------------------------------------------------------------------ asking, looking

async function ask() {
  await Promise.all(["left", "right"].map(async (side) => {
    $(`${side}-answer`).textContent = "…";
    const body = { model: $(side).value, prompt: $("question").value, max_tokens: 32, temperature: 0 };
    const answer = await call("/v1/completions", body);
    $(`${side}-answer`).textContent = visible(answer.choices[0].text, "\n");
  }));
  return "";
}

async function look() {
  const seen = await call("/inspect", { prompt: $("looked").value, model: $("looked-model").value });
  const head = element("tr");
  head.append(element("th", "token"), ...seen.layers.map((layer) => element("th", `layer ${layer}`)));
  const rows = seen.tokens.map((token) => {
    const row = element("tr");
    row.append(element("th", token.token.replaceAll(" ", "·")));
    seen.layers.forEach((_, place) => {
      const value = seen.gate === "sequence" ? token.z[place] : token.norm[place];
      const threshold = seen.thresholds[place];
      const level = value === null || threshold === null ? 0 : Math.max(0, value / threshold);
      const made = element("td", `${token.fire[place] ? "● " : ""}${level.toFixed(2)}`, token.fire[place] ? "fires" : "");
      made.style.setProperty("--level", Math.min(level, 1.5) / 2);
      row.append(made);
    });
    return row;
  });
  $("gate").replaceChildren(head, ...rows);
  $("legend").hidden = false;
  return "";
}

// ------------------------------------------------------------------ beginning

async function begin() {
  const models = (await call("/v1/models")).data.map((model) => model.id);
  for (const select of document.querySelectorAll(".models")) {
    select.replaceChildren(...models.map((name) => {
      const option = element("option", name);
      option.value = name;
      return option;
    }));
    select.value = select.id === "left" ? "base" : "default";
  }
  await reload();
  $("enter").hidden = true;
  return "";
}

function submitted(id, button, text, work) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    doing(button || event.submitter, text, work);
  });
}

submitted("add", $("commit"), "Editing", commit);
submitted("ask", null, "Asking", ask);
submitted("look", null, "Looking", look);
submitted("enter", null, "Entering", () => {
  try { sessionStorage.setItem("token", $("token").value); } catch { say("this browser keeps no token", true); }
  $("token").value = "";
  return begin();
});
$("preview").addEventListener("click", () => {
  if ($("add").reportValidity()) doing($("preview"), "Trying", preview);
});
$("search").addEventListener("input", showFacts);
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  $("theme").setAttribute("aria-pressed", String(!dark));
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("search").focus();
  }
});
doing(null, "Loading", begin);
