/**
 * Round trips from the host through a TAP and the relay to a user-mode Linux guest, in each of the relay's ways to
 * wait, and what CPU time each takes when there is nothing to do.
 *
 * A relay and a guest for each way are up all the time and take turns. A relay whose turn it is not is stopped: the
 * busy one would take its CPU from the others.
 */
import { setTimeout as delay } from "node:timers/promises";
import { Relay } from "../test/guests/relay.ts";
import { UmlGuest } from "../test/guests/uml.ts";
import { digits, printTable } from "./figures.ts";
import { ip, ping } from "./tap-host.ts";

const MODES = ["interrupt", "adaptive", "busy"] as const;
/** Longer than a poller looks for work before it sleeps. */
const PAUSE_SECONDS = 0.005;
const PINGS = 60;
const IDLE_MS = 3000;
const TICK_MS = 10;

interface Contestant {
  readonly mode: string;
  readonly relay: Relay;
  readonly guest: UmlGuest;
  readonly microseconds: number[];
  idle: number;
}

/** @param cpu of the relays' pollers */
export async function compareLatency({ rounds, cpu }: { rounds: number; cpu: number }): Promise<void> {
  await using stack = new AsyncDisposableStack();
  const contestants: Contestant[] = [];
  for (const [i, mode] of MODES.entries()) {
    const name = `bench-${mode}`;
    const links = (socket: string) => [`vhost-user:${socket}=tap:${name}`];
    const relay = stack.use(await Relay.start({ links, args: ["--poll", mode, "--cpus", String(cpu)] }));
    ip(`address add 10.99.${i}.1/24 dev ${name}`);
    ip(`link set ${name} up`);
    const guest = stack.use(await UmlGuest.boot({ socket: relay.sockets[0], ip: `10.99.${i}.2` }));
    await ping(guest.ip, 10, PAUSE_SECONDS); // addresses are resolved
    relay.signal("SIGSTOP");
    contestants.push({ mode, relay, guest, microseconds: [], idle: 0 });
  }

  for (let round = 0; round < rounds; round++) {
    for (let i = 0; i < contestants.length; i++) {
      const { relay, guest, microseconds } = contestants[(round + i) % contestants.length]!;
      relay.signal("SIGCONT");
      microseconds.push(...(await ping(guest.ip, PINGS, PAUSE_SECONDS)));
      relay.signal("SIGSTOP");
    }
  }
  for (const contestant of contestants) {
    contestant.relay.signal("SIGCONT");
    await delay(500);
    const before = contestant.relay.cpuTicks;
    await delay(IDLE_MS);
    contestant.idle = ((contestant.relay.cpuTicks - before) * TICK_MS) / IDLE_MS;
    contestant.relay.signal("SIGSTOP");
  }

  console.log(
    `\nlatency: ping from the host to a user-mode Linux guest, pauses of ${PAUSE_SECONDS * 1000} ms; ` +
      `idle over ${IDLE_MS / 1000} s`,
  );
  const rows = contestants.map(({ mode, microseconds, idle }) => {
    const sorted = microseconds.toSorted((a, b) => a - b);
    const at = (share: number) => digits(sorted[Math.floor(share * sorted.length)] ?? Number.NaN);
    const lost = rounds * PINGS - sorted.length;
    return [mode, at(0.5), at(0.9), at(0.99), String(sorted.length), String(lost), `${(100 * idle).toFixed(1)}%`];
  });
  printTable([["--poll", "p50 us", "p90 us", "p99 us", "pings", "lost", "idle CPU"], ...rows]);
  for (const { relay } of contestants) relay.signal("SIGCONT");
}
