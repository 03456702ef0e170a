/**
 * The demo's live view: a table that is redrawn in place on a terminal, a line at a time elsewhere.
 *
 * Colour only on a terminal, and not where NO_COLOR is set (no-color.org).
 */
import type { Direction, Progress } from "./demo.ts";

/** The part of a stream that the table needs. */
interface Screen {
  isTTY?: boolean;
  write(text: string): unknown;
}

const BOLD = "1";
const RED = "31";
const GREEN = "32";
const TITLES = ["", "packets/s", "Gbit/s", "drops", "verified"];
const WIDTHS = [8, 12, 8, 10, 16];

export class LiveTable {
  readonly #screen: Screen;
  readonly #live: boolean;
  readonly #colour: boolean;
  #before: Progress = { elapsedMs: 0, directions: [] };
  #lines = 0;

  constructor(screen: Screen, environment: NodeJS.ProcessEnv) {
    this.#screen = screen;
    this.#live = screen.isTTY === true;
    this.#colour = this.#live && !environment["NO_COLOR"];
  }

  /** How often update() should be called. */
  get intervalMs(): number {
    return this.#live ? 500 : 1000;
  }

  /** Shows the rates since the last call. */
  update(now: Progress): void {
    const spanMs = now.elapsedMs - this.#before.elapsedMs;
    const rows = now.directions.map((direction, i) => cells(direction, this.#before.directions[i], spanMs));
    this.#before = now;
    if (this.#live) this.#redraw(rows, now);
    else this.#screen.write(`${(now.elapsedMs / 1000).toFixed(1)} s  ${rows.map(sentence).join("  |  ")}\n`);
  }

  #redraw(rows: string[][], now: Progress): void {
    const seconds = `${(now.elapsedMs / 1000).toFixed(1)} s`;
    const lines = [
      this.#paint(BOLD, aligned([seconds, ...TITLES.slice(1)])),
      ...rows.map((row, i) => this.#paint(now.directions[i]?.drops ? RED : GREEN, aligned(row))),
    ];
    const home = this.#lines > 0 ? `\x1b[${this.#lines}A` : "";
    this.#screen.write(home + lines.map((line) => `\x1b[2K${line}\n`).join(""));
    this.#lines = lines.length;
  }

  #paint(colour: string, text: string): string {
    return this.#colour ? `\x1b[${colour}m${text}\x1b[0m` : text;
  }
}

/** The end in words, a line a direction. */
export function summary({ elapsedMs, directions }: Progress): string {
  const seconds = elapsedMs / 1000;
  return directions
    .map(({ name, sent, received, receivedBytes, drops }) => {
      const rate = `${whole(received / seconds)} packets/s, ${gigabits(receivedBytes, elapsedMs)} Gbit/s`;
      return `${name}: ${whole(sent)} frames sent, ${whole(received)} received and verified, ${whole(drops)} dropped; ${rate}\n`;
    })
    .join("");
}

function cells(direction: Direction, before: Direction | undefined, spanMs: number): string[] {
  const packets = direction.received - (before?.received ?? 0);
  const bytes = direction.receivedBytes - (before?.receivedBytes ?? 0);
  const rate = whole((packets * 1000) / Math.max(spanMs, 1));
  return [direction.name, rate, gigabits(bytes, spanMs), whole(direction.drops), whole(direction.received)];
}

const aligned = (row: readonly string[]): string => row.map((cell, i) => cell.padStart(WIDTHS[i] ?? 0)).join("  ");

const sentence = ([name, packets, gbits, drops, verified]: readonly string[]): string =>
  `${name} ${packets} packets/s ${gbits} Gbit/s ${drops} drops ${verified} verified`;

const whole = (value: number): string => Math.round(value).toLocaleString("en-US");

/** Frames alone, without preamble and gaps of a wire. */
const gigabits = (bytes: number, ms: number): string => ((bytes * 8) / Math.max(ms, 1) / 1e6).toFixed(2);
