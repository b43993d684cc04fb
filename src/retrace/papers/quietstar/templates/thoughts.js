"use strict";
// A row of data: [probability without, with, gain, mixing weight, [[thought, its gain, its weight], ...]]; [] for a first token.
const data = JSON.parse(document.getElementById("data").textContent);
const tokens = [...document.querySelectorAll(".doc .t")];
const panel = document.getElementById("panel");
const hint = panel.innerHTML;
const signed = x => (x > 0 ? "+" : x < 0 ? "\u2212" : "") + Math.abs(x).toFixed(3);
const probability = p => p >= 0.0005 ? p.toFixed(3) : p.toExponential(0).replace("-", "\u2212");
const visible = s => s.replace(/\r?\n/g, "\u21b5") || "\u00b7";
let pinned = null;

function make(tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

function bar(p, kind) {
  const outer = make("div", undefined, "bar " + kind), inner = make("i");
  inner.style.width = 100 * p + "%";
  outer.append(inner);
  return outer;
}

function show(index) {
  for (const token of document.querySelectorAll(".t.on")) token.classList.remove("on");
  if (index === null) { panel.innerHTML = hint; return; }
  tokens[index].classList.add("on");
  const row = data[index], head = make("h2", visible(tokens[index].textContent));
  if (!row.length) { panel.replaceChildren(head, make("p", "The first token: nothing comes before it to predict it from.")); return; }
  const [without, withThought, gain, weight, thoughts] = row, numbers = make("dl");
  const line = (name, value, kind) => numbers.append(make("dt", name), make("dd", value, kind));
  line("gain", signed(gain) + " nats", "big");
  line("without a thought", probability(without));
  numbers.append(bar(without, ""));
  line("with", probability(withThought));
  numbers.append(bar(withThought, "with"));
  line("mixing weight", signed(weight));
  const list = make("ul");
  for (const [text, own] of thoughts) {
    const item = make("li");
    item.append(make("q", visible(text)));
    if (thoughts.length > 1) item.append(make("span", signed(own)));
    list.append(item);
  }
  panel.replaceChildren(head, numbers, make("h3", thoughts.length > 1 ? "Thoughts before it, each with its own gain" : "Thought before it"), list);
}

function go(index) {
  if (index >= 0 && index < tokens.length) tokens[index].focus();
}

tokens.forEach((token, index) => {
  const [without, withThought, gain, , thoughts] = data[index];
  token.setAttribute("aria-label", visible(token.textContent) + (data[index].length
    ? `: gain ${signed(gain)} nats, ${probability(without)} without a thought, ${probability(withThought)} with; thought: ` + thoughts.map(t => visible(t[0])).join(" | ")
    : ": the first token, not predicted"));
  token.addEventListener("mouseenter", () => show(index));
  token.addEventListener("mouseleave", () => show(pinned));
  token.addEventListener("focus", () => show(pinned = index));
  token.addEventListener("click", () => token.focus());
  token.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { event.preventDefault(); go(index + step); }
    if (event.key === "Escape") { show(pinned = null); token.blur(); }
  });
});
