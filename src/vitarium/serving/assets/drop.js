const $ = (id) => document.getElementById(id);
let token = "";
let running = null;
let shownUrl = "";

const headers = () => (token ? { Authorization: `Bearer ${token}` } : {});
const show = (id, on) => { $(id).hidden = !on; };

function fail(text) {
  $("error").textContent = text;
  show("error", Boolean(text));
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text; // as text: names of others are never read as HTML
  return made;
}

function pairs(list, rows) {
  list.replaceChildren(...rows.map(([name, value]) => {
    const row = element("div");
    row.append(element("dt", "", name), element("dd", "", value));
    return row;
  }));
}

async function asked(path, options) {
  const response = await fetch(path, options);
  if (response.ok) return response.json();
  if (response.status === 401) {
    show("ask", true);
    $("token").focus();
  }
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error || `the server answered with status ${response.status}`);
}

function bars(scores) {
  $("bars").replaceChildren(...scores.map(({ label, probability }) => {
    const row = element("li");
    const track = element("div", "track");
    const fill = element("div", "fill");
    fill.style.width = `${100 * probability}%`;
    track.append(fill);
    row.append(element("span", "who", label), element("span", "", percent(probability)), track);
    return row;
  }));
}

function plain(value) {
  if (Array.isArray(value) && value.every((v) => typeof v === "number")) {
    return `${value.length} numbers: ${value.slice(0, 8).map((v) => v.toPrecision(3)).join(", ")}${value.length > 8 ? ", …" : ""}`;
  }
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function present(row) {
  const { image, drawing, predictions, found, segments, ...rest } = row;
  const headline = predictions?.length ? predictions[0].label : found ?? "The answer";
  $("headline").textContent = headline;
  bars(predictions ?? (segments ?? []).map((s) => ({ label: s.label, probability: s.score })));
  pairs($("values"), Object.entries(rest).map(([name, value]) => [name.replaceAll("_", " "), plain(value)]));
  if (drawing) $("shown").src = drawing;
  show("answer", true);
}

async function send(file) {
  if (!file) return;
  fail("");
  if (file.size > results.megabytes * 1e6) {
    fail(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; at most ${results.megabytes} MB are accepted.`);
    return;
  }
  running?.abort(); // the server drops images whose request was aborted
  const mine = running = new AbortController();
  $("zone").classList.add("busy");
  URL.revokeObjectURL(shownUrl);
  shownUrl = URL.createObjectURL(file);
  const form = new FormData();
  form.append("files", file, file.name);
  const begin = performance.now();
  try {
    const answer = await asked("/predict?draw=true", { method: "POST", body: form, headers: headers(), signal: mine.signal });
    $("shown").src = shownUrl;
    $("shown").alt = file.name;
    $("caption").textContent = file.name;
    present(answer.images[0]);
    $("time").textContent = `${((performance.now() - begin) / 1000).toFixed(2)} seconds`;
  } catch (error) {
    if (error.name === "AbortError") return;
    show("answer", false);
    fail(error instanceof TypeError ? "The server cannot be reached. Does it still run?" : `No answer: ${error.message}.`);
  } finally {
    if (running === mine) $("zone").classList.remove("busy");
  }
}

async function describe() {
  try {
    const info = await asked("/info", { headers: headers() });
    const labels = info.labels ?? [];
    pairs($("model"), [
      ["file or name", info.model],
      ["architecture", info.architecture],
      ["task", info.task],
      ["classes", labels.length ? `${labels.length}: ${labels.slice(0, 12).join(", ")}${labels.length > 12 ? ", …" : ""}` : "none named"],
      ["input", info.preprocessing ? `${info.preprocessing.image_size} x ${info.preprocessing.image_size} pixels` : "any size"],
      ["methods", info.methods.join(", ") || "none"],
    ]);
    show("about", true);
    show("ask", false);
    fail("");
  } catch (error) {
    if ($("ask").hidden) fail(`The model's description cannot be read: ${error.message}.`);
  }
}

$("shown").addEventListener("load", () => $("shown").classList.toggle("small", $("shown").naturalWidth < 200));
$("file").addEventListener("change", () => { send($("file").files[0]); $("file").value = ""; });
$("token-form").addEventListener("submit", (event) => { event.preventDefault(); token = $("token").value.trim(); describe(); });
addEventListener("dragover", (event) => { event.preventDefault(); $("zone").classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("zone").classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  $("zone").classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) send(file); else fail("Drop an image file, not a text or a link.");
});
addEventListener("paste", (event) => send(event.clipboardData.files[0]));
if (results.token) show("ask", true); else describe();
