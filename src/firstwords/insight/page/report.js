"use strict";
// Draws the charts, and tells of a token what the model expected. All text goes in as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const RUNS = ["#c2571a", "#2f7f9f", "#6b8e23", "#8e5ba6", "#c0392b", "#7f8c8d"];
  const AXES = { step: "step", epochs: "epochs", tokens: "tokens", elapsed_s: "seconds" };

  // --- charts: DATA.charts[i].lines[j] = {run, table, column, name, look}

  function looks(line) {
    const own = data.runs.length > 1 ? RUNS[line.run % RUNS.length] : null;
    return {
      faint: { mode: "lines", opacity: .55, line: { width: 1, color: own || color("--second") } },
      line: { mode: "lines", line: { width: 1.3, color: own || color("--second") } },
      dashed: { mode: "lines", line: { width: 1.6, dash: "dash", color: own || color("--second") } },
      strong: { mode: "lines+markers", line: { width: 2.4, color: own || color("--accent") }, marker: { size: 5 } },
    }[line.look];
  }

  function trace(line, axis, onlyLine) {
    const run = data.runs[line.run], table = run[line.table];
    const name = data.runs.length > 1 ? (onlyLine ? run.name : `${run.name}: ${line.name}`) : line.name;
    return {
      type: "scatter", x: table[axis], y: table[line.column], name: name.replace(/[<&]/g, c => c === "<" ? "&lt;" : "&amp;"),
      hovertemplate: "%{y:.4~g}", ...looks(line),
    };
  }

  function layout(chart, axis, onlyLine) {
    const grid = color("--line"), soft = color("--soft");
    const side = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickcolor: grid, automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: soft, size: 12 },
      margin: { l: 48, r: 8, t: 8, b: 36 }, hovermode: "x unified",
      hoverlabel: { bgcolor: color("--card"), bordercolor: grid, font: { color: color("--ink") } },
      xaxis: { ...side, title: { text: AXES[axis], standoff: 6 }, rangemode: "tozero" },
      yaxis: onlyLine ? { ...side, rangemode: "tozero" } : side,  // a constant has no range of its own
      showlegend: chart.lines.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    };
  }

  function draw() {
    const chosen = document.querySelector("input[name=axis]:checked");
    for (const chart of data.charts) {
      const axis = chosen && data.runs.every(run => Object.values(run).every(t => !t.step || !t.step.length || t[chosen.value]))
        ? chosen.value : "step";
      const onlyLine = new Set(chart.lines.map(line => line.column)).size === 1;
      Plotly.react(chart.id, chart.lines.map(line => trace(line, axis, onlyLine)), layout(chart, axis, onlyLine),
        { responsive: true, displayModeBar: false });
    }
  }

  if (data.charts.length) {
    draw();
    document.querySelectorAll("input[name=axis]").forEach(input => input.addEventListener("change", draw));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }

  // --- the surprise map

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }
  const spelled = text => JSON.stringify(text).slice(1, -1).replace(/\\"/g, '"');
  const shown = value => value === null ? "beyond all numbers" : Math.abs(value) >= 1e-3 || value === 0 ? value.toFixed(4) : value.toExponential(2);
  const figure = (name, value) => element("output", { "data-figure": name, "data-value": String(value) }, shown(value));

  function guess(text, probability, own) {
    const bar = element("span", { class: "bar" });
    bar.style.width = `${100 * probability}%`;
    const percent = probability >= .001 ? `${(100 * probability).toFixed(1)} %` : probability.toExponential(1);
    const value = element("output", { "data-value": String(probability) }, percent);
    return element("div", { class: own ? "guess own" : "guess" }, element("code", {}, spelled(text)), element("span", {}, bar), value);
  }

  function expected(token) {
    const box = element("div", { id: "expected" }, element("h3", {}, `It read ${JSON.stringify(token.text)}, its choice no. ${token.rank.toLocaleString("en")}`));
    for (const one of token.top) box.append(guess(one.text, one.probability, one.id === token.id));
    if (!token.top.some(one => one.id === token.id)) box.append(guess(token.text, token.probability, true));
    return box;
  }

  function chain(token, all) {
    const rows = element("dl", { class: "chain", id: "chain" }), n = all.tokens.length - 1;
    const row = (formula, value, words) => rows.append(element("div", {}, element("dt", {}, formula), element("dd", {}, value, element("span", {}, words))));
    row("z", figure("logit", token.logit), "this token's logit");
    row("softmax", figure("log_sum_exp", token.logit - token.log_probability), "ln Σ exp(z) over all tokens");
    row("p", figure("probability", token.probability), "= exp(z − ln Σ exp(z))");
    row("ln p", figure("log_probability", token.log_probability), "nats: this token's part");
    row("mean", figure("mean", -all.nats_per_token), `of ln p over ${n.toLocaleString("en")} tokens`);
    row("−mean", figure("nats_per_token", all.nats_per_token), "cross-entropy, nats per token");
    row("exp", figure("perplexity", all.perplexity), "perplexity: unsure among so many");
    row("÷ bytes", figure("bits_per_byte", all.bits_per_byte), "bits per byte: Σ −log₂ p / bytes");
    return element("div", {}, element("h3", {}, "How it enters the loss"), rows);
  }

  function choose(tokens, i, focus) {
    const all = data.explanation, token = all.tokens[i], chosen = document.getElementById("chosen");
    tokens.forEach((one, j) => { one.tabIndex = j === i ? 0 : -1; one.setAttribute("aria-pressed", j === i); });
    if (focus) tokens[i].focus();
    chosen.replaceChildren(token.probability === null
      ? element("p", { class: "note" }, "Nothing stands before the first token, so it is not predicted.")
      : element("div", { class: "two" }, expected(token), chain(token, all)));
  }

  if (data.explanation) {
    const tokens = [...document.querySelectorAll(".token")], passage = document.querySelector(".passage");
    const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    passage.addEventListener("click", event => {
      const token = event.target.closest(".token");
      if (token) choose(tokens, Number(token.dataset.i), true);
    });
    passage.addEventListener("keydown", event => {
      const at = tokens.indexOf(document.activeElement);
      if (at < 0) return;
      if (event.key in STEPS) choose(tokens, Math.min(tokens.length - 1, Math.max(0, at + STEPS[event.key])), true);
      else if (event.key === "Enter" || event.key === " ") choose(tokens, at, true);
      else return;
      event.preventDefault();
    });
    const hottest = all => all.reduce((best, token, i) => (token.log_probability ?? 0) < (all[best].log_probability ?? 0) ? i : best, 0);
    choose(tokens, hottest(data.explanation.tokens), false);
  }
})();
