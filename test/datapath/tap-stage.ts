/**
 * What tests of links with a TAP interface have in common: a relay in a network namespace, virtual machines at its sockets,
 * and packet sockets on its interfaces.
 */
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { expect } from "vitest";
import { findInterface } from "../../native/network-interface.ts";
import { Guest } from "../../src/driver/guest.ts";
import { NetDriver, type NetDriverOptions } from "../../src/driver/net.ts";
import { Relay, type LaneSnapshot, type RelayEvent, type RelayOptions } from "../../src/index.ts";
import { missingTools } from "../guests/tools.ts";
import { enterNewNetwork } from "../native/namespace.ts";
import { Vm, type VmOptions } from "./tap-vm.ts";

/** Waiting for something that must come is given up after so many rounds of a millisecond or more without any of it. */
const ROUNDS_MAX = 20_000;

/** Once, at the top of a test file. @returns why its tests cannot run here, or undefined if they can */
export function enterNetwork(): string | undefined {
  const reason = missingTools("ip", "ethtool") ?? enterNewNetwork();
  // IPv6 speaks by itself.
  if (reason === undefined) writeFileSync("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
  return reason;
}

export function ip(...words: string[]): string {
  return execFileSync("ip", words, { encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });
}

export function interfaces(): string[] {
  return (JSON.parse(ip("-j", "link", "show")) as { ifname: string }[]).map(({ ifname }) => ifname);
}

/** Waits until it is so. */
export async function until(what: string, isSo: () => boolean): Promise<void> {
  for (let round = 0; !isSo(); round++) {
    expect(round, `waiting until ${what}`).toBeLessThan(ROUNDS_MAX);
    await sleep(1);
  }
}

/** One relay, and all that a test opens around it. */
export class Stage {
  readonly directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  readonly open = new DisposableStack();
  readonly events: RelayEvent[] = [];
  relay: Relay | undefined;

  path(name: string): string {
    return join(this.directory, `${name}.sock`);
  }

  port(name: string, options = ""): string {
    return `vhost-user:${this.path(name)}${options}`;
  }

  /** @param taps one link for each: VMs "a", "b", ... with so many queue pairs */
  async start(taps: readonly string[], { queues = 1, ...options }: Partial<RelayOptions> & { queues?: number } = {}) {
    const links = taps.map((tap, i) => [this.port("abcdefgh"[i]!, `,queues=${queues}`), tap] as const);
    this.relay = await Relay.start({ links, ...options, onEvent: (event) => this.events.push(event) });
    return this.relay;
  }

  /** A VM with a driver that judges all that it gets, and takes no offloads. */
  async driver(name: string, options: Partial<NetDriverOptions> = {}): Promise<NetDriver> {
    const guest = this.open.use(new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }]));
    return this.open.use(await NetDriver.connect({ path: this.path(name), guest, ...options }));
  }

  /** A VM with a driver that does as it is told. */
  async vm(name: string, options: VmOptions = {}): Promise<Vm> {
    return this.open.use(await Vm.connect(this.path(name), options));
  }

  get state() {
    return this.relay!.state;
  }

  /** The lane of a link that carries what the guest sends, or what it gets. */
  lane(direction: "send" | "receive", { link = 0, pair = 0 } = {}): LaneSnapshot {
    const found = this.state.links[link]!.lanes.find(
      (lane) => lane.pair === pair && lane.from.startsWith("vhost-user:") === (direction === "send"),
    );
    if (!found) throw new Error(`link ${link} has no lane to ${direction} of pair ${pair}`);
    return found;
  }

  /** All drops of all lanes. */
  get dropped(): number {
    const lanes = this.state.links.flatMap((link) => link.lanes);
    return lanes.flatMap(({ drops }) => Object.values(drops)).reduce((sum, count) => sum + count, 0);
  }

  /** What the interfaces told, less how they are reached. */
  get news(): string[] {
    return this.events.flatMap((event) => ("name" in event && event.type !== "method" ? [event.type] : []));
  }

  /** Ends everything; what the relay made is gone then, and nothing went wrong in it. */
  async close(): Promise<void> {
    this.open.dispose();
    await this.relay?.close();
    rmSync(this.directory, { recursive: true });
    const left = interfaces().filter((name) => name !== "lo");
    for (const name of left) if (findInterface(name)) ip("link", "del", name);
    expect(left.filter((name) => name.startsWith("tap"))).toEqual([]);
    const bad = ["fatal", "trapped", "fault", "broken", "refused"];
    expect(this.events.filter(({ type }) => bad.includes(type))).toEqual([]);
  }
}
