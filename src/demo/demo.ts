/**
 * The demo: two drivers, each a real vhost-user front-end in a thread of its own, exchange frames through a relay.
 *
 * Everything between them is what serves virtual machines: unix sockets, SCM_RIGHTS, memory files, eventfds, the core.
 * Both directions carry a known sequence of frames at full speed, and every frame that arrives is checked.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { Relay } from "../datapath/relay.ts";
import type { RelayEvent } from "../datapath/relay.ts";
import { DriverThread } from "./driver.ts";

interface DemoOptions {
  /** How long to transmit; Infinity is until the signal. */
  seconds: number;
  /** Captured frames to replay between the generated ones. */
  frames: readonly Uint8Array[];
  /** Ends the demo early, with all that belongs to an end. */
  signal: AbortSignal;
  /** Told how far it is, every `intervalMs`. */
  onProgress: (progress: Progress) => void;
  intervalMs: number;
}

/** One direction of the link, from the beginning until now. */
export interface Direction {
  name: string;
  sent: number;
  received: number;
  receivedBytes: number;
  drops: number;
}

export interface Progress {
  elapsedMs: number;
  directions: readonly Direction[];
}

interface Outcome extends Progress {
  /** Why it failed; undefined if every frame that was sent arrived and was verified. */
  failure: string | undefined;
}

const POLL_MS = 20;
/** Frames still on their way when this passes without an arrival are lost. Longer than a lane's stall limit. */
const DRAIN_MS = 2000;

export async function runDemo({ seconds, frames, signal, onProgress, intervalMs }: DemoOptions): Promise<Outcome> {
  const stop = new AbortController();
  let failure: string | undefined;
  const fail = (reason: string): void => {
    failure ??= reason;
    stop.abort();
  };
  const directory = mkdtempSync(join(tmpdir(), "vhost-relay-"));
  using _directory = { [Symbol.dispose]: () => rmSync(directory, { recursive: true, force: true }) };
  const paths = [join(directory, "a.sock"), join(directory, "b.sock")] as const;
  await using relay = await Relay.start({
    links: [[`vhost-user:${paths[0]}`, `vhost-user:${paths[1]}`]],
    onEvent: (event) => {
      const reason = trouble(event);
      if (reason !== undefined) fail(reason);
    },
  });
  await using a = new DriverThread({ path: paths[0], frames, send: 0, expect: 1 }, (error) =>
    fail(`driver a: ${error.message}`),
  );
  await using b = new DriverThread({ path: paths[1], frames, send: 1, expect: 0 }, (error) =>
    fail(`driver b: ${error.message}`),
  );
  await Promise.all([a.ready, b.ready]);

  const directions = (): Direction[] => [
    {
      name: "a -> b",
      sent: a.sent,
      received: b.received,
      receivedBytes: b.receivedBytes,
      drops: drops(relay, paths[0]),
    },
    {
      name: "b -> a",
      sent: b.sent,
      received: a.received,
      receivedBytes: a.receivedBytes,
      drops: drops(relay, paths[1]),
    },
  ];
  const start = performance.now();
  const ended = AbortSignal.any([signal, stop.signal]);
  for (const driver of [a, b]) driver.enter("transmit");
  while (!ended.aborted) {
    const restMs = start + seconds * 1000 - performance.now();
    if (restMs <= 0) break;
    await sleep(Math.min(intervalMs, restMs), undefined, { signal: ended }).catch(() => undefined);
    onProgress({ elapsedMs: performance.now() - start, directions: directions() });
  }
  const elapsedMs = performance.now() - start;
  for (const driver of [a, b]) driver.enter("drain");
  await drain([a, b], directions, stop.signal);

  const final = directions();
  return { elapsedMs, directions: final, failure: failure ?? missing(final) };
}

/** Waits until everything sent has arrived, or nothing arrives any more. */
async function drain(
  drivers: readonly DriverThread[],
  directions: () => Direction[],
  failed: AbortSignal,
): Promise<void> {
  let arrived = -1;
  for (let lateMs = 0; lateMs < DRAIN_MS && !failed.aborted; lateMs += POLL_MS) {
    // In this order: what is sent is final before it is compared.
    const isFinal = drivers.every((driver) => driver.isDraining);
    const now = directions();
    if (isFinal && now.every(({ sent, received }) => sent === received)) return;
    const total = now.reduce((sum, { received }) => sum + received, 0);
    if (total !== arrived) lateMs = 0;
    arrived = total;
    await sleep(POLL_MS);
  }
}

function missing(directions: readonly Direction[]): string | undefined {
  const short = directions.find(({ sent, received }) => sent !== received);
  if (short === undefined) return undefined;
  const { name, sent, received, drops: dropped } = short;
  return `${name}: ${sent - received} of ${sent} frames did not arrive; the relay dropped ${dropped}`;
}

function drops(relay: Relay, from: string): number {
  const lanes = relay.state.links.flatMap((link) => link.lanes).filter((lane) => lane.from === `vhost-user:${from}`);
  return lanes.flatMap((lane) => Object.values(lane.drops)).reduce((sum, count) => sum + count, 0);
}

/** What makes the demo fail: in it nobody breaks a rule and nobody leaves early. */
function trouble(event: RelayEvent): string | undefined {
  if (event.type === "fatal") return `the poller died: ${String(event.error)}`;
  if (event.type === "trapped") return `${event.lane} trapped: ${event.reason}`;
  if (event.type === "broken") return `${event.lane}: virtqueue ${event.virtqueue} of ${event.port} is broken`;
  return undefined;
}
