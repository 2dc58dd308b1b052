// Panels, drawn by Grafana's own components. What Grafana's panel plugins set by default is set here by hand.
import { FieldConfigOptionsRegistry, applyFieldOverrides, cacheFieldDisplayNames, dateTime, getDisplayValueAlignmentFactors, getFieldDisplayValues, transformDataFrame } from '@grafana/data';
import { BigValue, PanelChrome, TimeSeries, VizRepeater, useTheme2 } from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import { firstValueFrom } from 'rxjs';

const STANDARD = ['unit', 'min', 'max', 'decimals', 'displayName', 'noValue', 'color', 'thresholds', 'mappings', 'links'];
const CUSTOM = {
  timeseries: { drawStyle: 'line', lineInterpolation: 'linear', lineWidth: 1, fillOpacity: 0, gradientMode: 'none', showPoints: 'auto', pointSize: 5, spanNulls: false, stacking: { mode: 'none', group: 'A' }, axisPlacement: 'auto', axisLabel: '', axisSoftMin: undefined, axisSoftMax: undefined, thresholdsStyle: { mode: 'off' }, hideFrom: { viz: false, legend: false, tooltip: false } },
  table: { align: 'auto', width: undefined, minWidth: 50, cellOptions: { type: 'auto' }, inspect: false },
  stat: {},
};
const COLOR = { timeseries: { mode: 'palette-classic' }, stat: { mode: 'thresholds' }, table: { mode: 'thresholds' } };
const GREEN = { mode: 'absolute', steps: [{ value: null, color: 'green' }] };

export const TYPES = Object.keys(CUSTOM);

/** Every property that a panel of this type may set, in defaults or overrides. */
export function propertiesOf(type) {
  return { standard: STANDARD, custom: Object.keys(CUSTOM[type]) };
}

function registry(type) {
  const item = (path, isCustom) => ({ id: isCustom ? `custom.${path}` : path, path, name: path, isCustom, process: (value) => value, shouldApply: () => true, getItemsCount: () => 1, override: () => null, editor: () => null });
  return new FieldConfigOptionsRegistry(() => [...STANDARD.map((path) => item(path, false)), ...Object.keys(CUSTOM[type]).map((path) => item(path, true))]);
}

/** `frames` after the panel's transformations, with its units, colours and overrides. */
export async function withFieldConfig(panel, frames, theme) {
  const transformed = await firstValueFrom(transformDataFrame(panel.transformations ?? [], frames));
  const whole = applyFieldOverrides({ data: transformed, fieldConfig: fieldConfigOf(panel), fieldConfigRegistry: registry(panel.type), replaceVariables: (text) => text, theme, timeZone: 'utc' });
  cacheFieldDisplayNames(whole);
  return whole;
}

function fieldConfigOf({ type, fieldConfig }) {
  const { defaults, overrides } = structuredClone(fieldConfig);
  const whole = { color: COLOR[type], thresholds: GREEN, mappings: [], ...defaults, custom: { ...CUSTOM[type], ...defaults.custom } };
  whole.thresholds.steps[0].value = -Infinity; // JSON has none
  return { defaults: whole, overrides };
}

export function Panel({ panel, frames, range, width, height }) {
  const theme = useTheme2();
  const Drawn = DRAWN[panel.type];
  return (
    <PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
      {(innerWidth, innerHeight) => (frames.length ? <Drawn {...{ panel, frames, range, theme }} width={innerWidth} height={innerHeight} /> : <NoData panel={panel} />)}
    </PanelChrome>
  );
}

function NoData({ panel }) {
  return <div className="no-data">{panel.fieldConfig.defaults.noValue ?? 'No data'}</div>;
}

/** Numbers that are none, as a quantile of nothing, are gaps. */
function withGaps(frames) {
  const finite = (values) => values.map((value) => (Number.isFinite(value) ? value : null));
  return frames.map((frame) => ({ ...frame, fields: frame.fields.map((field) => (field.type === 'number' ? { ...field, values: finite(field.values) } : field)) }));
}

function DrawnTimeSeries({ panel, frames, range, width, height }) {
  const timeRange = { from: dateTime(range.from), to: dateTime(range.to), raw: { from: dateTime(range.from), to: dateTime(range.to) } };
  return <TimeSeries frames={withGaps(frames)} timeRange={timeRange} timeZone="utc" width={width} height={height} legend={panel.options.legend} options={panel.options} />;
}

function DrawnStat({ panel, frames, theme, width, height }) {
  const { graphMode = 'area', colorMode = 'value', justifyMode = 'auto', textMode = 'auto', orientation, text } = panel.options;
  const draw = ({ value, alignmentFactors, width, height, count }) => (
    <BigValue value={value.display} sparkline={value.sparkline} count={count} {...{ colorMode, graphMode, justifyMode, textMode, text, alignmentFactors, width, height, theme }} />
  );
  const reduced = { reduceOptions: { values: false, ...panel.options.reduceOptions }, sparkline: graphMode !== 'none' };
  const getValues = () => getFieldDisplayValues({ data: frames, fieldConfig: fieldConfigOf(panel), replaceVariables: (text) => text, theme, timeZone: 'utc', ...reduced });
  return <VizRepeater {...{ width, height, getValues }} source={frames} orientation={orientation ?? 'auto'} renderCounter={0} autoGrid renderValue={draw} getAlignmentFactors={getDisplayValueAlignmentFactors} />;
}

function DrawnTable({ panel, frames, width, height }) {
  return <TableNG data={frames[0]} width={width} height={height} noHeader={panel.options.showHeader === false} cellHeight={panel.options.cellHeight} initialSortBy={panel.options.sortBy} structureRev={1} />;
}

const DRAWN = { timeseries: DrawnTimeSeries, stat: DrawnStat, table: DrawnTable };
