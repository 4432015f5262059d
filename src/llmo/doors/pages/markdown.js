// Renders Markdown as DOM nodes. Text only ever becomes text nodes, so nothing a model writes can become markup.

const DEPTH = 6; // of quotes, lists and emphasis within each other
const WINDOW = 2000; // characters within which a mark must be closed: what keeps hostile text cheap

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Show `text` in `into`; blocks that have not changed since the last call keep their nodes. */
export function render(into, text, copy) {
  const made = blocks(text.split(/\r\n|\n|\r/), 0);
  const before = into.sources ?? [];
  let same = 0;
  while (same < made.length && same < before.length && made[same].source === before[same]) same += 1;
  while (into.childNodes.length > same) into.lastChild.remove();
  for (const block of made.slice(same)) into.append(block.build(copy));
  into.sources = made.map(({ source }) => source);
}

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) { at += 1; continue; }
    const [end, build] = block(lines, at, depth);
    found.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return found;
}

/** The block that begins at a line: where it ends, and what makes its node. */
function block(lines, at, depth) {
  const fence = FENCE.exec(lines[at]);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(lines[at]);
  if (heading) return [at + 1, () => spans(element(`h${Math.min(6, heading[1].length + 2)}`), heading[2].replace(/\s#+\s*$/, ""))];
  if (RULE.test(lines[at])) return [at + 1, () => element("hr")];
  if (depth < DEPTH && QUOTE.test(lines[at])) return quote(lines, at, depth);
  if (depth < DEPTH && ITEM.test(lines[at])) return list(lines, at, depth);
  if (lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DIVIDER.test(lines[at + 1])) return table(lines, at);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !starts(lines[end])) end += 1;
  const text = lines.slice(at, end).join("\n");
  return [end, () => spans(element("p"), text)];
}

function starts(line) {
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || ITEM.test(line) || RULE.test(line);
}

function code(lines, at, [, mark, language]) {
  let end = at + 1;
  while (end < lines.length && !closes(lines[end], mark)) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  const build = (copy) => {
    const figure = element("figure");
    const caption = element("figcaption");
    const button = element("button", "Copy");
    button.type = "button";
    button.addEventListener("click", () => copy(text, button));
    caption.append(element("span", language), button);
    const pre = element("pre");
    pre.tabIndex = 0; // so that a wide one can be scrolled without a mouse
    pre.append(element("code", text));
    figure.append(caption, pre);
    return figure;
  };
  return [Math.min(end + 1, lines.length), build];
}

function closes(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && [...text].every((letter) => letter === mark[0]);
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inside = lines.slice(at, end).map((line) => QUOTE.exec(line)[1]);
  return [end, (copy) => nested(element("blockquote"), inside, depth, copy)];
}

function list(lines, at, depth) {
  const [, margin, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    const indent = /^\s*/.exec(lines[end])[0].length;
    if (item && item[1].length <= margin.length + 1 && /\d/.test(item[2]) === ordered) items.push([item[3]]);
    else if (lines[end].trim() === "") {
      const next = lines.slice(end, end + 3).find((line) => line.trim());
      if (next === undefined || !(ITEM.test(next) || /^\s/.test(next)) || /^\s*/.exec(next)[0].length < margin.length) break;
      items.at(-1).push("");
    } else if (indent > margin.length + 1 || (!item && !starts(lines[end]))) items.at(-1).push(lines[end].slice(Math.min(indent, margin.length + 2)));
    else break;
    end += 1;
  }
  const build = (copy) => {
    const node = element(ordered ? "ol" : "ul");
    if (ordered) node.start = Number.parseInt(mark, 10);
    for (const inside of items) node.append(nested(element("li"), inside, depth, copy));
    return node;
  };
  return [end, build];
}

function nested(into, lines, depth, copy) {
  for (const inner of blocks(lines, depth + 1)) into.append(inner.build(copy));
  return into;
}

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const build = () => {
    const frame = element("div");
    const node = element("table");
    frame.className = "table";
    frame.tabIndex = 0;
    for (const [index, line] of [lines[at], ...lines.slice(at + 2, end)].entries()) {
      const row = element("tr");
      for (const cell of cells(line)) row.append(spans(element(index ? "td" : "th"), cell));
      node.append(row);
    }
    frame.append(node);
    return frame;
  };
  return [end, build];
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
}

/** Append text with its marks: code, strong, emphasis, strikethrough, links. */
function spans(into, text, depth = 0) {
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const [node, end] = (depth < DEPTH && span(text, at, depth)) || [null, at + 1];
    if (node === null) plain += text[at];
    else {
      into.append(plain, node);
      plain = "";
    }
    at = end;
  }
  into.append(plain);
  return into;
}

function span(text, at, depth) {
  const letter = text[at];
  if (letter === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) return [document.createTextNode(text[at + 1]), at + 2];
  if (letter === "`") return codeSpan(text, at);
  if (letter === "*" || letter === "_" || letter === "~") return marked(text, at, depth);
  if (letter === "[") return link(text, at, depth);
  if (letter === "h" && !/\w/.test(text[at - 1] ?? "")) return bare(text, at);
  return null;
}

function codeSpan(text, at) {
  let size = 1;
  while (text[at + size] === "`") size += 1;
  const mark = "`".repeat(size);
  const end = close(text, at + size, mark);
  return end < 0 ? [document.createTextNode(mark), at + size] : [element("code", text.slice(at + size, end).replace(/^ (.*) $/s, "$1")), end + size];
}

function marked(text, at, depth) {
  const double = text[at + 1] === text[at];
  if (text[at] === "~" && !double) return null;
  const mark = double ? text[at] + text[at] : text[at];
  const from = at + mark.length;
  const inWord = text[at] === "_" && /\w/.test(text[at - 1] ?? "");
  if (inWord || /\s/.test(text[from] ?? " ")) return null;
  const end = close(text, from, mark);
  if (end <= from || /\s/.test(text[end - 1]) || (text[at] === "_" && /\w/.test(text[end + mark.length] ?? ""))) return null;
  const name = text[at] === "~" ? "del" : double ? "strong" : "em";
  return [spans(element(name), text.slice(from, end), depth + 1), end + mark.length];
}

function link(text, at, depth) {
  const middle = close(text, at + 1, "](");
  if (middle < 0) return null;
  const end = close(text, middle + 2, ")");
  if (end < 0) return null;
  const node = anchor(text.slice(middle + 2, end).trim().split(/\s/)[0]);
  return node && [spans(node, text.slice(at + 1, middle), depth + 1), end + 1];
}

function bare(text, at) {
  const found = /^https?:\/\/[^\s<>"'`)\]}]+/.exec(text.slice(at, at + WINDOW));
  if (!found) return null;
  const url = found[0].replace(/[.,;:!?]+$/, "");
  const node = anchor(url);
  if (node === null) return null;
  node.append(url);
  return [node, at + url.length];
}

/** A link, if it leads to where a click may lead. */
function anchor(url) {
  let found;
  try {
    found = new URL(url);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(found.protocol)) return null;
  const node = element("a");
  node.href = found.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  node.title = found.href;
  return node;
}

function close(text, from, mark) {
  const at = text.slice(from, from + WINDOW).indexOf(mark);
  return at < 0 ? -1 : from + at;
}

function element(name, text = "") {
  const node = document.createElement(name);
  node.textContent = text;
  return node;
}
