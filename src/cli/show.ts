/** `vhost-relay show`: a table on a terminal, JSON with -j, indented with -p. */
import { findRelays, readState, type FoundRelay } from "../control/api.ts";
import type { LaneSnapshot, PortState } from "../datapath/relay.ts";
import { SystemError } from "../errors.ts";

export async function show(options: { json?: boolean; pretty?: boolean; control?: string }): Promise<void> {
  const relays = options.control
    ? [{ socket: options.control, state: await readState(options.control) }]
    : await findRelays();
  if (options.json || options.pretty) {
    process.stdout.write(`${JSON.stringify(relays, null, options.pretty ? 2 : undefined)}\n`);
    return;
  }
  if (relays.length === 0) throw new SystemError("connect", 2, "ENOENT", "no relay of this user is running");
  process.stdout.write(relays.map(describe).join("\n"));
}

const COLUMNS: [title: string, value: (lane: LaneSnapshot) => string | number][] = [
  ["lane", (lane) => lane.name],
  ["packets", (lane) => lane.packets],
  ["bytes", (lane) => lane.bytes],
  ["drops", (lane) => Object.values(lane.drops).reduce((sum, n) => sum + n, 0)],
  ["kicks", (lane) => lane.kicks],
  ["calls", (lane) => lane.calls.source + lane.calls.destination],
  ["suppressed", (lane) => lane.calls.suppressed],
  ["waits", (lane) => lane.waits],
  ["per batch", (lane) => (lane.batches ? (lane.packets / lane.batches).toFixed(1) : "-")],
];

function describe({ socket, state }: FoundRelay): string {
  const lines = [`relay ${socket}`];
  for (const link of state.links) {
    lines.push(`  ${link.name}: ${link.ports.map(describePort).join("  <->  ")}`);
    const lanes = link.lanes.toSorted((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
    if (lanes.length > 0) lines.push(...table(lanes).map((line) => `    ${line}`));
    for (const lane of lanes) {
      const drops = Object.entries(lane.drops).filter(([, n]) => n > 0);
      if (drops.length > 0)
        lines.push(`    ${lane.name} dropped: ${drops.map(([reason, n]) => `${reason} ${n}`).join(", ")}`);
    }
  }
  return `${lines.join("\n")}\n`;
}

function describePort({ port, state, mtu, interface: reached }: PortState): string {
  const facts = [state, mtu === null ? "" : `mtu ${mtu}`];
  if (reached) facts.push(`${reached.name} by ${reached.method}`);
  return `${port} (${facts.filter((fact) => fact !== "").join(", ")})`;
}

function table(lanes: readonly LaneSnapshot[]): string[] {
  const rows = [
    COLUMNS.map(([title]) => title),
    ...lanes.map((lane) => COLUMNS.map(([, value]) => String(value(lane)))),
  ];
  const widths = COLUMNS.map((_, i) => Math.max(...rows.map((row) => row[i]?.length ?? 0)));
  return rows.map((row) =>
    row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join("  "),
  );
}
