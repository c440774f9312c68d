// The conversation: what was said, what is being answered, and what the keys do.

const $ = id => document.getElementById(id);
const NUMBERS = ['temperature', 'top_p', 'top_k', 'max_tokens', 'seed'];
const store = {
  get(area, name, otherwise) { try { return JSON.parse(area().getItem(name)) ?? otherwise; } catch { return otherwise; } },
  set(area, name, value) {
    try {
      area().setItem(name, JSON.stringify(value, (key, part) => key === 'node' ? undefined : part));
    } catch { /* private windows keep nothing */ }
  },
};
const LASTING = () => localStorage, OF_TAB = () => sessionStorage;

let settings = store.get(LASTING, 'tandem.settings', {});
let turns = store.get(OF_TAB, 'tandem.turns', []);  // [{said, answers: [{model, text, thought, note, error}]}]
let models = [];
const running = new Set();  // answers being written, each with its AbortController

const isComparing = () => models.length > 1 && Boolean(settings.compare);
const chosen = () => models.find(model => model.id === settings.model) || models[0];
const asked = () => isComparing() ? models : [chosen()];
const save = () => { store.set(LASTING, 'tandem.settings', settings); store.set(OF_TAB, 'tandem.turns', turns); };
const headers = () => ({ 'content-type': 'application/json', ...(settings.key ? { authorization: 'Bearer ' + settings.key } : {}) });

// --- what is seen

function showAll() {
  $('turns').replaceChildren(...turns.map(showTurn));
  showState();
  toEnd();
}

function showTurn(turn) {
  const answers = h('div', { class: 'answers' });
  turn.node = h('section', { class: 'turn' }, h('div', { class: 'said' }), answers);
  showSaid(turn);
  answers.classList.toggle('two', turn.answers.length > 1);
  answers.append(...turn.answers.map(answer => showAnswer(turn, answer)));
  return turn.node;
}

function showSaid(turn) {
  turn.node.querySelector('.said').replaceChildren(h('div', { class: 'bubble' }, turn.said),
    h('div', { class: 'actions' }, iconButton('edit', 'Edit', () => edit(turn)), copyButton(() => turn.said)));
}

function showAnswer(turn, answer) {
  const thought = h('details', { class: 'thought', hidden: true }, h('summary'), h('div'));
  const content = h('div', { class: 'md' });
  const actions = h('div', { class: 'actions' });
  answer.node = h('article', { class: 'answer' }, turn.answers.length > 1 ? h('h3', null, answer.model) : null,
    thought, content, h('p', { class: 'error', hidden: true }), actions);
  actions.append(copyButton(() => answer.text), iconButton('again', 'Regenerate (Alt+R)', () => regenerate(turn, answer)), h('small'));
  refresh(answer);
  return answer.node;
}

function refresh(answer) {
  const node = answer.node, isRunning = running.has(answer);
  const [thought, content, error, actions] = ['.thought', '.md', '.error', '.actions'].map(part => node.querySelector(part));
  thought.hidden = !answer.thought;
  thought.firstChild.textContent = isRunning && !answer.text ? 'Thinking' : answer.thoughtSeconds ? `Thought for ${answer.thoughtSeconds} s` : 'Thought';
  if (thought.lastChild.textContent !== answer.thought) thought.lastChild.textContent = answer.thought;
  showMarkdown(content, answer.text);
  content.classList.toggle('waiting', isRunning && !answer.text);
  content.classList.toggle('busy', isRunning && Boolean(answer.text));
  error.hidden = !answer.error;
  error.textContent = answer.error || '';
  actions.querySelector('small').textContent = answer.note || '';
  for (const button of actions.querySelectorAll('button')) button.hidden = isRunning;
}

function showState() {
  const isRunning = running.size > 0, model = chosen();
  document.body.classList.toggle('comparing', isComparing());
  $('go').replaceChildren(icon(isRunning ? 'stop' : 'send'));
  $('go').setAttribute('aria-label', isRunning ? 'Stop (Esc)' : 'Send');
  $('go').disabled = !isRunning && (!models.length || !$('text').value.trim());
  $('compare').hidden = models.length < 2;
  $('compare').setAttribute('aria-pressed', isComparing());
  $('model').hidden = models.length < 2 || isComparing();
  $('name').hidden = !$('model').hidden;
  const name = isComparing() ? models.map(one => one.id).join(' and ') : model ? model.id : '';
  $('name').textContent = name;
  $('greeting').textContent = name || 'Loading the model';
  $('about').textContent = model ? `Up to ${model.max_model_len.toLocaleString()} tokens` : '';
  document.title = name ? `${name} - Tandem` : 'Tandem';
}

const isAtEnd = () => $('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight < 60;
const toEnd = () => { $('scroll').scrollTop = $('scroll').scrollHeight; };

const keys = [...$('hint').childNodes];

function news(text) {
  $('hint').classList.toggle('news', Boolean(text));
  $('hint').replaceChildren(...text ? [text] : keys);
}

function fit(area) {
  area.style.height = 'auto';
  area.style.height = area.scrollHeight + 'px';
}

// --- asking

function send(said) {
  if (!models.length || running.size || !said.trim()) return;
  const turn = { said: said.trim(), answers: [] };
  turns.push(turn);
  $('turns').append(showTurn(turn));
  ask(turn, asked().map(model => model.id));
}

function ask(turn, names) {
  turn.answers = names.map(model => ({ model, text: '', thought: '' }));
  const replaced = turn.node;
  replaced.replaceWith(showTurn(turn));
  for (const answer of turn.answers) write(turn, answer);
  toEnd();
}

// What the model gets: of each earlier turn its own answer, or the one that there is.
function messagesFor(turn, model) {
  const messages = settings.system ? [{ role: 'system', content: settings.system }] : [];
  for (const one of turns) {
    messages.push({ role: 'user', content: one.said });
    if (one === turn) return messages;
    const answer = one.answers.find(answer => answer.model === model) || one.answers[0];
    messages.push({ role: 'assistant', content: answer ? answer.text : '' });
  }
  return messages;
}

function bodyFor(turn, model) {
  const body = { model, messages: messagesFor(turn, model), stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (Number.isFinite(settings[name])) body[name] = settings[name];
  if (settings.thinking) body.chat_template_kwargs = { enable_thinking: settings.thinking === 'on' };
  return body;
}

async function write(turn, answer) {
  const control = new AbortController(), start = performance.now();
  let first = 0, pieces = 0, drawn = false;
  Object.assign(answer, { text: '', thought: '', note: '', error: '', thoughtSeconds: '', stop: () => control.abort() });
  running.add(answer);
  showState();
  refresh(answer);
  const draw = () => {
    if (drawn) return;
    drawn = true;
    requestAnimationFrame(() => {
      drawn = false;
      const follows = isAtEnd();
      if (running.has(answer) && first) answer.note = speed(pieces, performance.now() - first);
      refresh(answer);
      if (follows) toEnd();
    });
  };
  let tokens = 0, reason = '';
  try {
    const response = await fetch('v1/chat/completions', {
      method: 'POST', headers: headers(), body: JSON.stringify(bodyFor(turn, answer.model)), signal: control.signal });
    if (!response.ok) throw await problemOf(response);
    for await (const event of eventsOf(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason || reason;
      const { content, reasoning_content: thought } = choice.delta;
      if (!content && !thought) continue;
      first ||= performance.now();
      pieces++;
      if (content && answer.thought && !answer.text) answer.thoughtSeconds = ((performance.now() - start) / 1000).toFixed(1);
      answer.text += content || '';
      answer.thought += thought || '';
      draw();
    }
    answer.note = [speed(tokens, performance.now() - first, tokens), `first after ${((first - start) / 1000).toFixed(1)} s`,
      reason === 'length' ? 'cut at the longest answer' : ''].filter(Boolean).join(' · ');
    if (!first) answer.note = 'an empty answer';
  } catch (error) {
    answer.note = control.signal.aborted ? 'stopped' : '';
    answer.error = control.signal.aborted ? '' : error.message;
    if (error.isAboutKey) openSettings(error.message);
  }
  running.delete(answer);
  const follows = isAtEnd();
  refresh(answer);
  showState();
  if (follows) toEnd();
  save();
}

const speed = (tokens, milliseconds, all) =>
  [all ? `${all} tokens` : '', tokens > 1 && milliseconds > 50 ? `${((tokens - 1) / milliseconds * 1000).toFixed(1)} tokens/s` : '']
    .filter(Boolean).join(' · ');

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error('the answer broke off: the server is gone');
    const lines = (waiting + value).split('\n');
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith('data: ')) continue;
      if (line === 'data: [DONE]') return;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function problemOf(response) {
  const body = await response.json().catch(() => ({}));
  const error = new Error(body.error ? body.error.message : `the server answers with ${response.status}`);
  error.isAboutKey = response.status === 401;
  return error;
}

function stop() {
  for (const answer of running) answer.stop();
}

// --- what buttons and keys do

function regenerate(turn, answer) {
  if (running.size) return;
  cutAfter(turn);
  if (answer && turn.answers.length > 1) write(turn, answer);
  else ask(turn, asked().map(model => model.id));
}

function cutAfter(turn) {
  for (const later of turns.splice(turns.indexOf(turn) + 1)) later.node.remove();
}

function edit(turn) {
  if (running.size) return;
  const area = h('textarea', { rows: 1, 'aria-label': 'Edit the message' });
  const keep = () => showSaid(turn);
  const done = () => {
    if (!area.value.trim()) return;
    turn.said = area.value.trim();
    cutAfter(turn);
    ask(turn, asked().map(model => model.id));
    $('text').focus();
  };
  area.value = turn.said;
  area.addEventListener('input', () => fit(area));
  area.addEventListener('keydown', event => {
    if (event.key === 'Escape') { event.stopPropagation(); keep(); $('text').focus(); }
    if (isSending(event)) { event.preventDefault(); done(); }
  });
  turn.node.querySelector('.said').replaceChildren(h('div', { class: 'bubble editing' }, area),
    h('div', { class: 'row' }, h('button', { type: 'button', class: 'word', onclick: keep }, 'Cancel'),
      h('button', { type: 'button', class: 'word main', onclick: done }, 'Send')));
  fit(area);
  area.focus();
}

function renew() {
  stop();
  turns = [];
  save();
  showAll();
  $('text').focus();
}

function compare() {
  if (models.length < 2 || running.size) return;
  settings.compare = !settings.compare;
  save();
  showState();
}

function openSettings(problem) {
  const form = $('settings').querySelector('form');
  for (const field of form.elements) if (field.name) field.value = settings[field.name] ?? '';
  $('problem').hidden = !problem;
  $('problem').textContent = problem || '';
  if (!$('settings').open) $('settings').showModal();
  if (problem) form.elements.key.focus();
}

function keepSettings() {
  const hadKey = settings.key;
  for (const field of $('settings').querySelector('form').elements) {
    if (!field.name) continue;
    const value = field.value.trim();
    settings[field.name] = value === '' ? undefined : NUMBERS.includes(field.name) ? Number(value) : value;
  }
  save();
  if (settings.key !== hadKey) load();
  $('text').focus();
}

const isSending = event => event.key === 'Enter' && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
const ALT = { KeyN: renew, KeyR: () => turns.length && regenerate(turns[turns.length - 1]), KeyC: compare, KeyS: () => openSettings() };

$('composer').addEventListener('submit', event => {
  event.preventDefault();
  if (running.size) { stop(); return; }
  const said = $('text').value;
  if (!said.trim() || !models.length) return;
  $('text').value = '';
  fit($('text'));
  send(said);
});
$('text').addEventListener('input', () => { fit($('text')); showState(); });
$('text').addEventListener('keydown', event => {
  if (isSending(event)) {
    event.preventDefault();
    if (!running.size) $('composer').requestSubmit();
  } else if (event.key === 'ArrowUp' && !$('text').value && turns.length) {
    event.preventDefault();
    edit(turns[turns.length - 1]);
  }
});
addEventListener('keydown', event => {
  if (event.key === 'Escape' && running.size) stop();
  if (event.altKey && !event.ctrlKey && !event.metaKey && ALT[event.code]) { event.preventDefault(); ALT[event.code](); }
  if (event.key === '/' && !event.target.closest('input, textarea, dialog')) { event.preventDefault(); $('text').focus(); }
});
$('new').addEventListener('click', renew);
$('compare').addEventListener('click', compare);
$('open').addEventListener('click', () => openSettings());
$('settings').addEventListener('close', keepSettings);
$('settings').addEventListener('click', event => { if (event.target === $('settings')) $('settings').close(); });
$('model').addEventListener('change', () => { settings.model = $('model').value; save(); showState(); });

async function load() {
  try {
    const response = await fetch('v1/models', { headers: headers() });
    if (!response.ok) throw await problemOf(response);
    models = (await response.json()).data;
    $('model').replaceChildren(...models.map(model => h('option', { value: model.id }, model.id)));
    $('model').value = chosen().id;
    news('');
  } catch (error) {
    if (error.isAboutKey) openSettings(error.message);
    else { news(error.message); setTimeout(load, 1000); }
  }
  showState();
}

for (const turn of turns) for (const answer of turn.answers) answer.note ??= '';
showAll();
load();
