// Markdown to DOM nodes: what models write most. Text only ever becomes text nodes, so nothing in it can run.

export function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Blocks of the source: fenced code, or lines up to an empty one.
function split(source) {
  const blocks = [];
  let lines = [];
  let fence = null;
  const close = () => {
    if (lines.length) blocks.push(lines.join("\n"));
    lines = [];
  };
  for (const line of source.split("\n")) {
    const mark = line.match(/^ {0,3}(`{3,}|~{3,})/);
    if (fence) {
      lines.push(line);
      if (mark && mark[1].startsWith(fence) && line.trim() === mark[1]) {
        fence = null;
        close();
      }
    } else if (mark) {
      close();
      fence = mark[1];
      lines.push(line);
    } else if (line.trim() === "") {
      close();
    } else {
      lines.push(line);
    }
  }
  close();
  return blocks;
}

const INLINE = /(`+)(.+?)\1(?!`)|\*\*(.+?)\*\*|(?<![\w*])\*([^\s*](?:[^*]*[^\s*])?)\*(?![\w*])|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/s;

function inline(text) {
  const found = text.match(INLINE);
  if (!found) return [text];
  const [whole, ticks, code, strong, soft, label, target] = found;
  let made;
  if (ticks) made = node("code", {}, code);
  else if (strong) made = node("strong", {}, ...inline(strong));
  else if (soft) made = node("em", {}, ...inline(soft));
  else made = node("a", { href: target, target: "_blank", rel: "noopener noreferrer" }, label);
  return [text.slice(0, found.index), made, ...inline(text.slice(found.index + whole.length))];
}

const ITEM = /^( *)([-*+]|\d+[.)]) +/;

// Lines of a list to nested lists, by how far they are indented.
function list(lines) {
  const [, indent, mark] = lines[0].match(ITEM);
  const made = node(/\d/.test(mark) ? "ol" : "ul");
  if (/\d/.test(mark)) made.start = parseInt(mark, 10);
  let index = 0;
  while (index < lines.length) {
    const inner = [];
    const text = [lines[index].replace(ITEM, "")];
    for (index += 1; index < lines.length; index += 1) {
      const item = lines[index].match(ITEM);
      if (item && item[1].length <= indent.length) break;
      if (item || inner.length) inner.push(lines[index]);
      else text.push(lines[index].trim());
    }
    const item = node("li", {}, ...inline(text.join("\n")));
    if (inner.length) item.append(list(inner));
    made.append(item);
  }
  return made;
}

function row(line, tag) {
  const cells = line.trim().replace(/^\||\|$/g, "").split("|");
  return node("tr", {}, ...cells.map((cell) => node(tag, {}, ...inline(cell.trim()))));
}

function code(block) {
  const lines = block.split("\n");
  const fence = lines[0].match(/^ {0,3}(`{3,}|~{3,})/)[1];
  const isClosed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
  const text = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  const copy = node("button", { type: "button", textContent: "Copy", className: "copy-code" });
  return node("div", { className: "code" }, node("pre", { tabIndex: 0 }, node("code", {}, text)), copy);
}

function render(block) {
  const lines = block.split("\n");
  if (/^ {0,3}(`{3,}|~{3,})/.test(block)) return [code(block)];
  const heading = lines[0].match(/^(#{1,6}) +(.*)/);
  if (heading) {
    const level = Math.min(heading[1].length + 2, 5);
    const rest = lines.slice(1).join("\n");
    return [node(`h${level}`, {}, ...inline(heading[2])), ...(rest ? render(rest) : [])];
  }
  if (/^ {0,3}([-*_])( *\1){2,} *$/.test(block)) return [node("hr")];
  if (lines.every((line) => line.startsWith(">"))) {
    return [node("blockquote", {}, ...render(lines.map((line) => line.replace(/^> ?/, "")).join("\n")))];
  }
  if (lines.length > 1 && lines[0].includes("|") && /^[\s|:-]+$/.test(lines[1]) && lines[1].includes("-")) {
    const rows = lines.slice(2).map((line) => row(line, "td"));
    return [node("table", {}, node("thead", {}, row(lines[0], "th")), node("tbody", {}, ...rows))];
  }
  const first = lines.findIndex((line) => ITEM.test(line));
  if (first === 0) return [list(lines)];
  if (first > 0) return [...render(lines.slice(0, first).join("\n")), list(lines.slice(first))];
  return [node("p", {}, ...inline(block))];
}

// Show `source` in `target`. Blocks that are as they were keep their nodes, so that a long answer stays cheap to extend.
export function show(target, source) {
  const blocks = split(source);
  const shown = target.blocks ?? [];
  let same = 0;
  while (same < blocks.length && same < shown.length && shown[same].block === blocks[same]) same += 1;
  for (const old of shown.splice(same)) old.nodes.forEach((one) => one.remove());
  for (const block of blocks.slice(same)) {
    const nodes = render(block);
    target.append(...nodes);
    shown.push({ block, nodes });
  }
  target.blocks = shown;
}
