'use strict';
// Markdown as nodes of the document. Text becomes text nodes only, so nothing that a model writes can become HTML.

function h(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat().filter(child => child != null));
  return node;
}

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const TABLE_RULE = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$/;
const DEEPEST = 24;  // blocks in blocks

const indentOf = line => line.length - line.trimStart().length;
const isBlank = line => !line.trim();
const begins = line => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

// The blocks of some lines: each says where it ends, and makes its nodes when it is asked.
function blocksOf(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) { at++; continue; }
    const begin = at, [end, make] = depth > DEEPEST ? paragraph(lines, at) : blockAt(lines, at, depth);
    at = Math.max(end, begin + 1);
    blocks.push({ source: lines.slice(begin, at).join('\n'), make });
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [at + 1, () => h('h' + heading[1].length, null, inline(heading[2]))];
  if (RULE.test(line)) return [at + 1, () => h('hr')];
  if (QUOTE.test(line)) return quote(lines, at, depth);
  if (ITEM.test(line)) return list(lines, at, depth);
  if (line.includes('|') && TABLE_RULE.test(lines[at + 1] || '')) return table(lines, at);
  return paragraph(lines, at);
}

function code(lines, at, [, indent, marks, language]) {
  let end = at + 1;
  const isEnd = line => line.trim().startsWith(marks) && !line.trim().replaceAll(marks[0], '');
  while (end < lines.length && !isEnd(lines[end])) end++;
  const text = lines.slice(at + 1, end).map(line => line.slice(Math.min(indentOf(line), indent.length))).join('\n');
  return [end + 1, () => h('div', { class: 'code' },
    h('div', null, language || 'text', copyButton(() => text)), h('pre', null, h('code', null, text)))];
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && (QUOTE.test(lines[end]) || !(isBlank(lines[end]) || begins(lines[end])))) end++;
  const inner = lines.slice(at, end).map(line => line.replace(QUOTE, ''));
  return [end, () => h('blockquote', null, nodesOf(blocksOf(inner, depth + 1)))];
}

function list(lines, at, depth) {
  const [, spaces, mark] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(mark), items = [];
  let end = at, isLoose = false;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    if (!match || RULE.test(lines[end]) || match[1].length > spaces.length + 1 || match[1].length < spaces.length
        || /\d/.test(match[2]) !== isOrdered) break;
    const width = match[1].length + match[2].length + 1, inner = [lines[end].slice(match[0].length)];
    for (end++; end < lines.length; end++) {
      const line = lines[end], isInside = indentOf(line) > match[1].length + 1;
      if (isBlank(line)) {
        const next = lines.slice(end).find(later => !isBlank(later));
        if (next === undefined || !(indentOf(next) > match[1].length + 1 || ITEM.test(next))) break;
        isLoose ||= ITEM.test(next) ? indentOf(next) <= match[1].length + 1 : true;
        inner.push('');
      } else if (isInside || !begins(line) && !isBlank(inner[inner.length - 1])) {
        inner.push(line.slice(Math.min(indentOf(line), width)));
      } else break;
    }
    items.push(inner);
  }
  return [end, () => h(isOrdered ? 'ol' : 'ul', { start: isOrdered && parseInt(mark) !== 1 && parseInt(mark) },
    items.map(inner => h('li', null, nodesOf(blocksOf(inner, depth + 1), isLoose))))];
}

function table(lines, at) {
  const cells = line => line.trim().replace(/^\||\|$/g, '').split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll('\\|', '|'));
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && lines[end].includes('|')) end++;
  const sides = cells(lines[at + 1]).map(cell => cell.endsWith(':') ? (cell.startsWith(':') ? 'center' : 'right') : '');
  const row = (line, tag) => h('tr', null, cells(line).slice(0, sides.length).map((cell, number) => {
    const node = h(tag, null, inline(cell));
    node.style.textAlign = sides[number];
    return node;
  }));
  return [end, () => h('div', { class: 'scroll' }, h('table', null, h('thead', null, row(lines[at], 'th')),
    h('tbody', null, lines.slice(at + 2, end).map(line => row(line, 'td')))))];
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !begins(lines[end])) end++;
  const text = lines.slice(at, end).map(line => line.trimStart()).join('\n');
  return [end, () => h('p', null, inline(text))];
}

// Paragraphs of a tight list stand without <p>.
function nodesOf(blocks, isLoose = true) {
  return blocks.map(block => block.make()).flatMap(node => node.tagName === 'P' && !isLoose ? [...node.childNodes] : [node]);
}

const INLINE = new RegExp([
  /\\(?<escaped>[!-\/:-@[-`{-~])/,
  /(?<ticks>`+)(?<code>[^`]|[^`][\s\S]*?[^`])\k<ticks>(?!`)/,
  /!?\[(?<label>(?:\\.|[^\[\]\\]|\[[^\[\]]*\])*)\]\(\s*<?(?<target>(?:[^\s()<>]|\([^\s()<>]*\))*)>?(?:\s+["'][^"')]*["'])?\s*\)/,
  /<(?<auto>(?:https?:\/\/|mailto:)[^\s<>]+)>/,
  /(?<bare>https?:\/\/[^\s<>"'`\])]*[^\s<>"'`\]).,;:!?*_])/,
  /\*\*(?=\S)(?<strong>(?:[^*]|\*(?!\*))+?)(?<=\S)\*\*(?!\*)/,
  /(?<![\p{L}\p{N}_])__(?=\S)(?<strong2>[^_]+?(?:_[^_]+?)*?)(?<=\S)__(?![\p{L}\p{N}_])/u,
  /\*(?=[^\s*])(?<em>(?:[^*]|\*\*[^*]+\*\*)+?)(?<=\S)\*(?!\*)/,
  /(?<![\p{L}\p{N}_])_(?=[^\s_])(?<em2>[^_]+?)(?<=\S)_(?![\p{L}\p{N}_])/u,
  /~~(?=\S)(?<del>[^~]+?)(?<=\S)~~/,
  /(?<br> *\n)/,
].map(part => part.source).join('|'), 'gu');

function inline(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const nodes = [];
  let at = 0;
  const inner = part => inline(part, depth + 1);
  for (const match of text.matchAll(INLINE)) {
    const found = match.groups;
    if (match.index > at) nodes.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    const strong = found.strong ?? found.strong2, em = found.em ?? found.em2;
    if (found.escaped) nodes.push(found.escaped);
    else if (found.code !== undefined) nodes.push(h('code', null, found.code.replace(/^ (.*[^ ].*) $/s, '$1')));
    else if (found.label !== undefined) nodes.push(link(found.target, found.label ? inner(found.label) : [found.target], match[0]));
    else if (found.auto || found.bare) nodes.push(link(found.auto || found.bare, [found.auto || found.bare], match[0]));
    else if (strong !== undefined) nodes.push(h('strong', null, inner(strong)));
    else if (em !== undefined) nodes.push(h('em', null, inner(em)));
    else if (found.del !== undefined) nodes.push(h('del', null, inner(found.del)));
    else nodes.push(h('br'));
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

// Only addresses that open a page or a letter; everything else stays the text that it is. Images are links, too.
function link(target, children, written) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return written;
  return h('a', { href: target, target: '_blank', rel: 'noopener noreferrer nofollow' }, children);
}

// Shows a text in a node. What stays as it is keeps its nodes, so that a selection lasts while more is written.
function showMarkdown(node, text) {
  const blocks = blocksOf(text.replace(/\r\n?/g, '\n').replace(/\t/g, '    ').split('\n'));
  const old = node.shownSources || [];
  let same = 0;
  while (same < blocks.length && same < old.length && blocks[same].source === old[same]) same++;
  while (node.childNodes.length > same) node.lastChild.remove();
  node.append(...nodesOf(blocks.slice(same)));
  node.shownSources = blocks.map(block => block.source);
}

function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const use = document.createElementNS('http://www.w3.org/2000/svg', 'use');
  use.setAttribute('href', '#' + name);
  svg.append(use);
  return svg;
}

function iconButton(name, label, act) {
  return h('button', { type: 'button', class: 'icon', 'aria-label': label, title: label, onclick: act }, icon(name));
}

function copyButton(text) {
  const button = iconButton('copy', 'Copy', async () => {
    await copy(text());
    button.replaceChildren(icon('done'));
    setTimeout(() => button.replaceChildren(icon('copy')), 1200);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // a page that was not fetched over https from another machine has no clipboard
    const area = h('textarea');
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
}
