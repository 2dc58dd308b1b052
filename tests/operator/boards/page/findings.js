// What is wrong with a dashboard as it stands on the page.
import { fieldColorModeRegistry, fieldMatchers, fieldReducers, getValueFormats, standardTransformersRegistry } from '@grafana/data';
import * as schema from '@grafana/schema';
import { TYPES, propertiesOf } from './panels';

const OPTIONS = {
  timeseries: ['legend', 'tooltip'],
  stat: ['reduceOptions', 'orientation', 'textMode', 'wideLayout', 'colorMode', 'graphMode', 'justifyMode', 'showPercentChange', 'text'],
  table: ['showHeader', 'cellHeight', 'sortBy', 'footer', 'frameIndex'],
};

const VALUES = {
  'options.legend.displayMode': schema.LegendDisplayMode,
  'options.legend.placement': ['bottom', 'right'],
  'options.tooltip.mode': schema.TooltipDisplayMode,
  'options.tooltip.sort': schema.SortOrder,
  'options.colorMode': schema.BigValueColorMode,
  'options.graphMode': schema.BigValueGraphMode,
  'options.justifyMode': schema.BigValueJustifyMode,
  'options.textMode': schema.BigValueTextMode,
  'options.orientation': schema.VizOrientation,
  'options.cellHeight': schema.TableCellHeight,
  'fieldConfig.defaults.thresholds.mode': schema.ThresholdsMode,
  'fieldConfig.defaults.custom.drawStyle': schema.GraphDrawStyle,
  'fieldConfig.defaults.custom.lineInterpolation': schema.LineInterpolation,
  'fieldConfig.defaults.custom.showPoints': schema.VisibilityMode,
  'fieldConfig.defaults.custom.stacking.mode': schema.StackingMode,
};

function unknownValues(panel, theme) {
  const found = [];
  for (const [path, known] of Object.entries(VALUES)) {
    const value = path.split('.').reduce((within, name) => within?.[name], panel);
    if (value !== undefined && !Object.values(known).includes(value)) found.push(`unknown value ${value} of ${path}`);
  }
  for (const calc of panel.options.reduceOptions?.calcs ?? []) if (!fieldReducers.getIfExists(calc)) found.push(`unknown calculation ${calc}`);
  const { color, thresholds } = panel.fieldConfig.defaults;
  const rules = panel.fieldConfig.overrides.flatMap(({ properties }) => properties).filter(({ id }) => id === 'color').map(({ value }) => value);
  for (const { mode, fixedColor } of [...(color ? [color] : []), ...rules]) {
    if (!fieldColorModeRegistry.getIfExists(mode)) found.push(`unknown colour mode ${mode}`);
    if (fixedColor && !isColor(fixedColor, theme)) found.push(`unknown colour ${fixedColor}`);
  }
  for (const step of thresholds?.steps ?? []) if (!isColor(step.color, theme)) found.push(`unknown colour ${step.color}`);
  return found;
}

function isColor(name, theme) {
  return CSS.supports('color', theme.visualization.getColorByName(name));
}

/** Of a panel's JSON: what Grafana would not know. */
export function unknownParts(panel, theme) {
  return TYPES.includes(panel.type) ? [...unknownNames(panel), ...unknownValues(panel, theme)] : [`unknown panel type ${panel.type}`];
}

function unknownNames(panel) {
  const found = Object.keys(panel.options).filter((name) => !OPTIONS[panel.type].includes(name)).map((name) => `unknown option ${name}`);
  const { standard, custom } = propertiesOf(panel.type);
  const { custom: ours = {}, ...defaults } = panel.fieldConfig.defaults;
  const set = [...Object.entries(defaults), ...Object.entries(ours).map(([name, value]) => [`custom.${name}`, value])];
  for (const { matcher, properties } of panel.fieldConfig.overrides) {
    if (!fieldMatchers.getIfExists(matcher.id)) found.push(`unknown matcher ${matcher.id}`);
    set.push(...properties.map(({ id, value }) => [id, value]));
  }
  for (const [name, value] of set) {
    const known = name.startsWith('custom.') ? custom.includes(name.slice(7)) : standard.includes(name);
    if (!known) found.push(`unknown field property ${name}`);
    if (name === 'unit' && !units().has(value) && !/^(suffix|prefix|si):/.test(value)) found.push(`unknown unit ${value}`);
  }
  for (const { id } of panel.transformations ?? []) if (!standardTransformersRegistry.getIfExists(id)) found.push(`unknown transformation ${id}`);
  return found;
}

let known;
function units() {
  known ??= new Set(getValueFormats().flatMap(({ submenu }) => submenu.map(({ value }) => value)));
  return known;
}

/** Whether any number would be seen. */
export function hasNumbers(frames) {
  return frames.some(({ fields, length }) => length > 0 && fields.some(({ type, values }) => (type === 'number' ? values.some((value) => Number.isFinite(value)) : type === 'string' && values.length)));
}

/** Whether a panel that has data also shows some: rows, a line or area that is not grey, or a text. */
export function showsSomething(type, element) {
  if (type === 'table') return element.querySelectorAll('[role=row]').length > 1;
  if (type !== 'timeseries') return /\d/.test(element.querySelector('[class*=content]')?.innerText ?? element.innerText);
  return [...element.querySelectorAll('canvas')].some((canvas) => {
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    let colored = 0;
    for (let i = 0; i < data.length; i += 4) {
      const [red, green, blue, alpha] = [data[i], data[i + 1], data[i + 2], data[i + 3]];
      if (alpha > 40 && Math.max(red, green, blue) - Math.min(red, green, blue) > 40) colored++;
    }
    return colored > 10;
  });
}

/** Text that does not fit where it stands, and legends of which a part is out of sight. Tables, and legends of many series, may be longer than
 * their panel. */
export function cutText(element) {
  const found = [];
  for (const node of element.querySelectorAll('*')) {
    const style = getComputedStyle(node);
    const hides = style.overflowX !== 'visible' || style.overflowY !== 'visible';
    if (!hides || !node.innerText?.trim() || !node.clientWidth) continue;
    const scrollbar = node.matches('[role=grid]') ? 16 : 1; // of a long table, which its columns do not allow for at first
    if (node.scrollWidth > node.clientWidth + scrollbar) found.push(`cut: ${text(node)} (${node.scrollWidth} > ${node.clientWidth} px wide)`);
    else if (node.scrollHeight > node.clientHeight + 2 && !mayScroll(node)) found.push(`out of sight: ${text(node)} (${node.scrollHeight} > ${node.clientHeight} px high)`);
  }
  return [...new Set(found)];
}

function mayScroll(node) {
  return node.closest('[role=grid]') || node.querySelectorAll('[data-testid^="data-testid VizLegend series"]').length > 6;
}

function text(node) {
  return JSON.stringify(node.innerText.trim().replace(/\s+/g, ' ').slice(0, 80));
}

/** Pairs of panels of which one lies over the other. */
export function overlaps(elements) {
  const boxes = elements.map((element) => [element.dataset.title, element.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1).map(([b]) => `${a} lies over ${b}`));
}
