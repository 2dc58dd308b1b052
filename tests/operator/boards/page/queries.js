// A dashboard's variables and queries, asked of Prometheus as Grafana's Prometheus data source documents it.
import { FieldType, createDataFrame, rangeUtil, renderLegendFormat } from '@grafana/data';

const MAX_POINTS = 1100; // of a series: more would be refused past 11,000

async function ask(source, path, parameters) {
  const answer = await fetch(`${source.url}/api/v1/${path}?${new URLSearchParams(parameters)}`);
  const body = await answer.json();
  if (body.status !== 'success') throw new Error(`${path}: ${body.error}`);
  return body.data;
}

/** Text with `$name` and `${name}` replaced; an unknown one is an error. `values`: name -> text. */
export function interpolate(text, values) {
  return text.replace(/\$(?:\{(\w+)\}|(\w+))/g, (whole, braced, bare) => {
    const name = braced ?? bare;
    if (!(name in values)) throw new Error(`unknown variable ${whole}`);
    return values[name];
  });
}

/** Names of variables -> what stands for them in queries. `chosen`: name -> values; of the others all. */
export async function resolveVariables(board, source, chosen) {
  const values = {};
  for (const variable of board.templating.list) {
    if (variable.type === 'datasource') {
      values[variable.name] = 'prometheus';
      continue;
    }
    const parts = /^label_values\((.+),\s*(\w+)\)$/.exec(variable.query.query);
    if (variable.type !== 'query' || !parts) throw new Error(`variable ${variable.name} is of an unknown form`);
    const { from, to } = source.range;
    const choices = await ask(source, `label/${parts[2]}/values`, { 'match[]': interpolate(parts[1], values), start: from / 1000, end: to / 1000 });
    if (!choices.length) throw new Error(`variable ${variable.name} has nothing to choose from`);
    const picked = chosen[variable.name];
    for (const value of picked ?? []) {
      if (!choices.includes(value)) throw new Error(`variable ${variable.name} does not offer ${value}, but ${choices}`);
    }
    values[variable.name] = picked ? regex(picked) : (variable.allValue ?? regex(choices));
  }
  return values;
}

function regex(values) {
  const escaped = values.map((value) => value.replace(/[\\^$.*+?()[\]{}|]/g, '\\\\$&'));
  return escaped.length === 1 ? escaped[0] : `(${escaped.join('|')})`;
}

/** What Grafana puts into a query by itself, for a panel of this many pixels. */
function intervals(source, width) {
  const { from, to, scrape_s: scrape } = source.range;
  const calculated = rangeUtil.calculateInterval({ from: { valueOf: () => from }, to: { valueOf: () => to } }, Math.min(width, MAX_POINTS), `${scrape}s`);
  const step = Math.max(1, calculated.intervalMs / 1000);
  return {
    step,
    values: {
      __interval: `${step}s`,
      __interval_ms: `${step * 1000}`,
      __rate_interval: `${Math.max(step + scrape, 4 * scrape)}s`,
      __range: `${Math.round((to - from) / 1000)}s`,
      __range_s: `${Math.round((to - from) / 1000)}`,
    },
  };
}

/** Frames of all queries of a panel. */
export async function framesOf(panel, source, variables, width) {
  const { step, values } = intervals(source, width);
  const frames = [];
  for (const target of panel.targets) {
    const expression = interpolate(target.expr, { ...variables, ...values });
    const { from, to } = source.range;
    const data = target.instant
      ? await ask(source, 'query', { query: expression, time: to / 1000 })
      : await ask(source, 'query_range', { query: expression, start: Math.floor(from / 1000 / step) * step, end: to / 1000, step });
    if (target.format === 'table') frames.push(table(data.result, target, panel.targets.length > 1 ? `Value #${target.refId}` : 'Value'));
    else frames.push(...data.result.map((series) => timeSeries(series, target, step, from)));
  }
  return frames;
}

function timeSeries(series, target, step, from) {
  const found = new Map((series.values ?? [series.value]).map(([time, value]) => [Math.round(time * 1000), number(value)]));
  const times = [...found.keys()];
  const all = [];
  for (let time = times[0]; time <= times.at(-1); time += step * 1000) all.push(time); // a gap is a gap
  const name = target.legendFormat ? renderLegendFormat(target.legendFormat, series.metric) : JSON.stringify(series.metric);
  return createDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: all, config: { interval: step * 1000 } },
      { name: 'Value', type: FieldType.number, labels: series.metric, values: all.map((time) => found.get(time) ?? null), config: { displayNameFromDS: name } },
    ],
  });
}

function table(result, target, value) {
  const labels = [...new Set(result.flatMap((series) => Object.keys(series.metric)))].sort();
  return createDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: result.map(({ value }) => value[0] * 1000) },
      ...labels.map((label) => ({ name: label, type: FieldType.string, values: result.map(({ metric }) => metric[label] ?? '') })),
      { name: value, type: FieldType.number, values: result.map(({ value }) => number(value[1])) },
    ],
  });
}

function number(text) {
  return text === '+Inf' ? Infinity : text === '-Inf' ? -Infinity : Number(text);
}
