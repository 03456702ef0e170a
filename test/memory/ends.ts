/** A relay with two ends, for what concerns its guests' memory: the relay as a library, drivers over real sockets. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect } from "vitest";
import { Guest, type RegionPlan } from "../../src/driver/guest.ts";
import { NetDriver, type NetDriverOptions } from "../../src/driver/net.ts";
import { Relay, type RelayEvent, type RelayOptions } from "../../src/index.ts";
import {
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
} from "../../src/layout/vhost-user.ts";
import { exchange } from "../datapath/traffic.ts";

const bit = (number: number): bigint => 1n << BigInt(number);

export class Ends implements AsyncDisposable {
  readonly relay: Relay;
  readonly #directory: string;
  readonly #events: RelayEvent[];
  readonly #open = new DisposableStack();

  /** A relay that listens for `a` and `b`. */
  static async start(options: Omit<RelayOptions, "links"> = {}): Promise<Ends> {
    const directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
    const events: RelayEvent[] = [];
    const links = [[`vhost-user:${join(directory, "a")}`, `vhost-user:${join(directory, "b")}`]] as const;
    const relay = await Relay.start({ ...options, links, onEvent: (event) => events.push(event) });
    return new Ends(relay, directory, events);
  }

  private constructor(relay: Relay, directory: string, events: RelayEvent[]) {
    this.relay = relay;
    this.#directory = directory;
    this.#events = events;
  }

  /** A guest, for as long as the relay. */
  guest(plan: readonly RegionPlan[], hugePageBytes?: number): Guest {
    return this.#open.use(new Guest(plan, hugePageBytes));
  }

  async connect(name: "a" | "b", guest: Guest, options: Partial<NetDriverOptions> = {}): Promise<NetDriver> {
    return this.#open.use(await NetDriver.connect({ path: join(this.#directory, name), guest, ...options }));
  }

  /** A driver that may add and remove regions: VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS. */
  async connectSlots(...given: Parameters<Ends["connect"]>): Promise<NetDriver> {
    const driver = await this.connect(...given);
    const features = bit(VHOST_USER_PROTOCOL_F_REPLY_ACK) | bit(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS);
    await driver.frontend.setProtocolFeatures(features);
    return driver;
  }

  /** Exchanges frames both ways for as long as something goes on: each arrives whole, in order, once. */
  async expectNothingLostWhile(a: NetDriver, b: NetDriver, happen: () => Promise<void>): Promise<void> {
    let goesOn = true;
    const happening = happen().finally(() => (goesOn = false));
    let first = 0;
    for (; goesOn; first += 50) {
      await exchange(a, b, 50, { first });
      await exchange(b, a, 50, { first });
    }
    await happening;
    expect(first).toBeGreaterThan(50);
    this.expectNothingLost();
  }

  /** No lane has dropped a frame, and nobody was refused or broken. */
  expectNothingLost(): void {
    const drops = this.relay.state.links[0]!.lanes.flatMap((lane) => Object.entries(lane.drops));
    expect(drops.filter(([, count]) => count > 0)).toEqual([]);
    expect(this.#events.filter(({ type }) => type !== "connect")).toEqual([]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#open.dispose();
    await this.relay.close();
    rmSync(this.#directory, { recursive: true });
  }
}
