// The whole page: one dashboard. `window.findings` is set once all is drawn: [panel, what is wrong] pairs.
import { createTheme, EventBusSrv, standardTransformers, standardTransformersRegistry } from '@grafana/data';
import { GlobalStyles, PanelContextProvider, ThemeContext } from '@grafana/ui';
import { Component, useEffect } from 'react';
import { createRoot } from 'react-dom/client';
import { cutText, hasNumbers, overlaps, showsSomething, unknownParts } from './findings';
import { Panel, withFieldConfig } from './panels';
import { framesOf, resolveVariables } from './queries';

// As in Grafana: 24 columns, rows of 30 pixels, 8 pixels between panels.
const [COLUMNS, ROW, GAP] = [24, 30, 8];
const theme = createTheme({ colors: { mode: 'dark' } });
const findings = [];
window.__grafana_public_path__ = '/public/';
standardTransformersRegistry.setInit(() => {
  const byId = new Map(Object.values(standardTransformers).map((one) => [one.id, one])); // one has two names
  return [...byId.values()].map((one) => ({ id: one.id, name: one.name, transformation: () => Promise.resolve(one), editor: () => null }));
});

function place({ x, y, w, h }, width) {
  const column = (width - GAP * (COLUMNS - 1)) / COLUMNS;
  return { left: x * (column + GAP), top: y * (ROW + GAP), width: w * column + (w - 1) * GAP, height: h * ROW + (h - 1) * GAP };
}

class Guarded extends Component {
  state = {};
  static getDerivedStateFromError(error) {
    return { error };
  }
  componentDidCatch(error) {
    findings.push([this.props.title, `threw ${error}`]);
  }
  render() {
    return this.state.error ? String(this.state.error) : this.props.children;
  }
}

function Board({ board, drawn, range, chosen, width, onDrawn }) {
  useEffect(() => void onDrawn(), []);
  const context = { eventsScope: 'global', eventBus: new EventBusSrv(), onSeriesColorChange: () => {} };
  const height = Math.max(...board.panels.map(({ gridPos }) => gridPos.y + gridPos.h)) * (ROW + GAP);
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles hackNoBackdropBlur={false} isExtensionSidebarOpen={false} />
      <PanelContextProvider value={context}>
        <h1>{board.title}</h1>
        <p>{board.templating.list.filter(({ type }) => type === 'query').map(({ name, label }) => `${label ?? name}: ${chosen[name]?.join(', ') ?? 'All'}`).join(' · ')}</p>
        <div className="grid" style={{ height }}>
          {board.panels.map((panel) => {
            const position = place(panel.gridPos, width);
            return (
              <div key={panel.id} className={panel.type === 'row' ? 'heading' : 'panel'} data-id={panel.id} data-title={panel.title} style={position}>
                <Guarded title={panel.title}>{panel.type === 'row' ? panel.title : <Panel panel={panel} frames={drawn[panel.id] ?? []} range={range} width={position.width} height={position.height} />}</Guarded>
              </div>
            );
          })}
        </div>
      </PanelContextProvider>
    </ThemeContext.Provider>
  );
}

async function load(panel, source, variables, width) {
  findings.push(...unknownParts(panel, theme).map((what) => [panel.title, what]));
  try {
    const frames = await framesOf(panel, source, variables, place(panel.gridPos, width).width);
    const ready = await withFieldConfig(panel, frames, theme);
    if (!hasNumbers(ready)) findings.push([panel.title, 'no data']);
    return hasNumbers(ready) ? ready : [];
  } catch (error) {
    findings.push([panel.title, `${error}`]);
    return [];
  }
}

/** `then`, once every panel has the icon that is loaded for its description, or it is clear that one will not come. */
function waitForIcons(then, triesLeft = 50) {
  return () => {
    const bare = [...document.querySelectorAll('.panel')].filter((element) => !element.querySelector('svg'));
    if (!bare.length) return then();
    if (triesLeft) return setTimeout(waitForIcons(then, triesLeft - 1), 200);
    findings.push(...bare.map(({ dataset }) => [dataset.title, 'has no description to point at']));
    then();
  };
}

async function main() {
  const { board, source, chosen } = await (await fetch(`/work${location.search}`)).json();
  const root = document.getElementById('root');
  const width = root.clientWidth - 2 * 16;
  const variables = await resolveVariables(board, source, chosen);
  const panels = board.panels.filter(({ type }) => type !== 'row');
  const drawn = Object.fromEntries(await Promise.all(panels.map(async (panel) => [panel.id, await load(panel, source, variables, width)])));
  await Promise.all([400, 500].map((weight) => document.fonts.load(`${weight} 14px Inter`))); // numbers measure themselves by it
  const look = () => {
    const elements = [...document.querySelectorAll('.grid > *')];
    for (const { id, title, type } of panels) {
      if (drawn[id].length && !showsSomething(type, document.querySelector(`[data-id="${id}"]`))) findings.push([title, 'shows nothing of its data']);
    }
    for (const element of elements) findings.push(...cutText(element).map((what) => [element.dataset.title, what]));
    findings.push(...overlaps(elements).map((what) => ['', what]));
    window.findings = findings;
  };
  const settled = () => setTimeout(waitForIcons(look), 1000);
  createRoot(root).render(<Board {...{ board, drawn, chosen, width }} range={source.range} onDrawn={settled} />);
}

main().catch((error) => (window.findings = [...findings, ['', `${error.stack}`]]));
