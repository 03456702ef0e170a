/**
 * The TAP port: an interface of the host's network stack, a queue of it for each queue pair of the guest at the other end.
 *
 * Main thread. Lanes read and write the queues' fds; here is all else: the interface is opened, set up and watched, and
 * told what the guest takes.
 */
import { ConfigError, SystemError } from "../errors.ts";
import { TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_USO4, TUN_F_USO6 } from "../layout/tun.ts";
import {
  VIRTIO_NET_F_CSUM,
  VIRTIO_NET_F_GUEST_CSUM,
  VIRTIO_NET_F_GUEST_ECN,
  VIRTIO_NET_F_GUEST_TSO4,
  VIRTIO_NET_F_GUEST_TSO6,
  VIRTIO_NET_F_GUEST_USO4,
  VIRTIO_NET_F_GUEST_USO6,
  VIRTIO_NET_F_HOST_ECN,
  VIRTIO_NET_F_HOST_TSO4,
  VIRTIO_NET_F_HOST_TSO6,
  VIRTIO_NET_F_HOST_USO,
} from "../layout/virtio.ts";
import { LANE_PAGES } from "../layout/lane.ts";
import { openRequestQueue, type RefusedMethod, type RequestMethod } from "../../native/request-queue.ts";
import { close } from "../../native/libc.ts";
import {
  changeInterface,
  findInterface,
  watchInterface,
  type InterfaceChange,
  type NetworkInterface,
} from "../../native/network-interface.ts";
import { adoptTap, openTap, setAttached, setDeaf, setOffloads, writeFrame, type TapQueues } from "../../native/tun.ts";
import type { Change, FilePort } from "./port.ts";
import { TAP_METHODS, type TapSpec } from "./spec.ts";

export type TapEvent =
  /** Brought up or down; while it is down it takes and gives no frames. Gone: deleted. Moved: to another network namespace. */
  | { type: "up" | "down" | "gone" | "moved"; name: string }
  | { type: "mtu"; name: string; mtu: number }
  /** How its queues will be read and written, and why not in a better way. */
  | { type: "method"; name: string; method: RequestMethod; refused: RefusedMethod[] }
  /** The kernel refused what follow() asked for. */
  | { type: "fault"; name: string; error: Error };

/** What a driver takes (GUEST_), and TUN_F_* for it. */
const TAKEN: readonly [feature: number, offload: number][] = [
  [VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM],
  [VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4],
  [VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6],
  [VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN],
  [VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4],
  [VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6],
];
const OFFLOADS = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
const USO = TUN_F_USO4 | TUN_F_USO6;
/** What a driver may leave to the interface. */
const LEFT = [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN];

interface TapOptions extends TapSpec {
  /** How many queues to open, unless they are given by their fds. */
  queuePairs: number;
  onEvent: (event: TapEvent) => void;
}

export class TapPort implements FilePort {
  readonly kind = "tap";
  readonly spec: string;
  readonly #options: TapOptions;
  #tap: TapQueues = { name: "", address: "", fds: [], isMultiQueue: false };
  #state: "up" | "down" | "gone" = "down";
  #mtu: number | undefined;
  #methods: readonly RequestMethod[];
  #index = 0;
  #watch: Disposable | undefined;
  #change: Change = () => Promise.resolve();
  /** TUN_F_* that the kernel can be told of. */
  #known = 0;
  /** TUN_F_* that it was told of last. */
  #offloads = 0;
  readonly #attached = new Set<number>();

  constructor(options: TapOptions) {
    this.#options = options;
    this.spec = options.text;
    this.#methods = options.io === undefined ? TAP_METHODS : [options.io];
  }

  /** Of the interface, once it is open. */
  get name(): string {
    return this.#tap.name;
  }

  /** Fds, one for each queue pair, as long as it is open. One that is not in use (see follow) gives nothing, yet takes frames. */
  get queues(): readonly number[] {
    return this.#tap.fds;
  }

  /** Numbers of the offload features that a guest may be offered, for what the interface takes and gives. Known once it is open. */
  get features(): readonly number[] {
    const taken = TAKEN.filter(([, offload]) => (this.#known & offload) !== 0).map(([feature]) => feature);
    const left = this.#known === 0 ? [] : (this.#known & USO) === 0 ? LEFT : [...LEFT, VIRTIO_NET_F_HOST_USO];
    return [...left, ...taken];
  }

  /** Of the interface; undefined if it is in another network namespace. */
  get mtu(): number | undefined {
    return this.#mtu;
  }

  /** The ways to read and write the queues: once it is open, the best one that works here, and those after it. */
  get methods(): readonly RequestMethod[] {
    return this.#methods;
  }

  /** "up" too if it is in another network namespace: nobody knows. */
  get state(): "up" | "down" | "gone" {
    return this.#state;
  }

  /**
   * Opens or creates the interface, sets it up, and begins to watch it. No queue is in use until follow() says so.
   * @param change for news that lanes must know of: another MTU or state
   * @throws ConfigError, SystemError; what was opened is closed then, and what was created gone
   */
  open(change: Change): void {
    this.#change = change;
    const { interface: wanted, queuePairs, bridge } = this.#options;
    const bridgeIndex = bridge === undefined ? undefined : indexOfBridge(bridge);
    const name = typeof wanted === "object" && "name" in wanted ? wanted.name : undefined;
    const isThere = wanted !== "new" && (name === undefined || findInterface(name) !== undefined);
    this.#tap = typeof wanted === "object" && "fds" in wanted ? adoptTap(wanted.fds) : openTap(name, queuePairs);
    try {
      this.#tap.fds.forEach((_, pair) => this.#attached.add(pair));
      this.#known = this.#probeOffloads();
      this.#attach([]);
      this.#setUp(bridgeIndex, isThere);
      this.#chooseMethod();
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /** An interface that was created disappears with this; one that was there already stays, and stays as it was set up. */
  close(): void {
    this.#watch?.[Symbol.dispose]();
    this.#watch = undefined;
    this.follow(0n, () => false);
    // A filter would outlive us, see setDeaf().
    const [fd] = this.#tap.fds;
    if (fd !== undefined && !this.#tap.isMultiQueue) setDeaf(fd, false);
    this.#tap.fds.forEach(close);
    this.#tap = { ...this.#tap, fds: [] };
    this.#attached.clear();
  }

  /**
   * Tells the interface what the guest at the other end takes, and from which queue pairs. The queue of a pair that is not in use
   * gets no frames, and is empty when it comes into use; it takes frames as ever. Does nothing if nothing changed.
   * @param features what the guest's driver acknowledged
   */
  follow(features: bigint, isInUse: (pair: number) => boolean): void {
    if (this.#state === "gone") return;
    const pairs = [...this.#tap.fds.keys()].filter(isInUse);
    const offloads = pairs.length === 0 ? 0 : offloadsFor(features) & this.#known;
    try {
      const isLess = (this.#offloads & ~offloads) !== 0;
      this.#tell(offloads);
      // Frames that the guest does not take may be queued: they go with the queues' detaching.
      if (isLess) this.#attach([]);
      this.#attach(pairs);
    } catch (error) {
      this.#observeFault(error);
    }
  }

  /** Gives the interface a frame (without a net header) as if the guest had sent it; dropped if it does not take it now. */
  inject(frame: Uint8Array): void {
    const [fd] = this.#tap.fds;
    if (fd !== undefined) writeFrame(fd, frame);
  }

  /** Makes these queues the ones in use. The first come before the last go: never are all gone in between. */
  #attach(pairs: readonly number[]): void {
    const { fds, isMultiQueue } = this.#tap;
    const set = (pair: number, isAttached: boolean): void => {
      const fd = fds[pair] as number;
      if (isMultiQueue) setAttached(fd, isAttached);
      else setDeaf(fd, !isAttached);
      if (isAttached) this.#attached.add(pair);
      else this.#attached.delete(pair);
    };
    for (const pair of pairs) if (!this.#attached.has(pair)) set(pair, true);
    for (const pair of this.#attached) if (!pairs.includes(pair)) set(pair, false);
  }

  #tell(offloads: number): void {
    if (offloads === this.#offloads) return;
    setOffloads(this.#tap.fds[0] as number, offloads);
    this.#offloads = offloads;
  }

  /** Tries the methods out, for a moment, and says which one it will be. @throws SystemError if none works */
  #chooseMethod(): void {
    const memory = new WebAssembly.Memory({ initial: LANE_PAGES, maximum: LANE_PAGES, shared: true });
    const target = { memory, fd: this.#tap.fds[0] as number, direction: "receive" as const };
    const { queue, refused } = openRequestQueue(target, this.#methods);
    queue.close();
    this.#methods = this.#methods.slice(refused.length);
    this.#options.onEvent({ type: "method", name: this.name, method: queue.method, refused });
  }

  #probeOffloads(): number {
    const fd = this.#tap.fds[0] as number;
    const known = [OFFLOADS | USO, OFFLOADS, 0].find((offloads) => takesOffloads(fd, offloads)) ?? 0;
    setOffloads(fd, 0);
    return known;
  }

  /** Whatever the user asked for and is not so yet; up. Begins to watch. */
  #setUp(master: number | undefined, isThere: boolean): void {
    const { mtu, onEvent } = this.#options;
    const found = findInterface(this.name);
    if (found?.address !== this.#tap.address) {
      if (mtu !== undefined || master !== undefined)
        throw new ConfigError(`${this.name} is in another network namespace; set its MTU and bridge there`);
      this.#state = "up";
      return;
    }
    this.#index = found.index;
    this.#watch = watchInterface(found.index, (news) => this.#observe(news));
    const change: InterfaceChange = {};
    if (mtu !== undefined && mtu !== found.mtu) change.mtu = mtu;
    if (master !== undefined && master !== found.master) change.master = master;
    if (!found.isUp) change.isUp = true;
    if (Object.keys(change).length > 0) this.#setInterface(found, change, isThere);
    const now = findInterface(found.index) ?? found;
    this.#state = now.isUp ? "up" : "down";
    this.#mtu = now.mtu;
    if (!now.isUp) onEvent({ type: "down", name: this.name });
  }

  /** An interface that was there already may be left down, if nothing else was asked for. */
  #setInterface(found: NetworkInterface, change: InterfaceChange, isThere: boolean): void {
    try {
      changeInterface(found.index, change, `setting up ${this.name} (${this.#byHand(change)})`);
    } catch (error) {
      if (error instanceof SystemError && error.code === "EPERM") {
        if (isThere && change.mtu === undefined && change.master === undefined) return;
        const fix = `run with CAP_NET_ADMIN, or have root do "${this.#byHand(change)}" before`;
        throw new SystemError(error.syscall, error.errno, error.code, `setting up ${this.name}; ${fix}`);
      }
      if (isThere) undo(found);
      throw error;
    }
  }

  /** What a user would type for it. */
  #byHand({ mtu, master, isUp }: InterfaceChange): string {
    const words = ["ip link set dev", this.name];
    if (mtu !== undefined) words.push(`mtu ${mtu}`);
    if (master !== undefined) words.push(`master ${this.#options.bridge}`);
    if (isUp) words.push("up");
    return words.join(" ");
  }

  #observe(news: NetworkInterface | "gone" | "moved"): void {
    if (typeof news === "string") {
      this.#watch?.[Symbol.dispose]();
      this.#watch = undefined;
      this.#mtu = undefined;
      this.#state = news === "gone" ? "gone" : "up";
      this.#tellNews({ type: news, name: this.name });
      return;
    }
    // News may be old when they are read: of what was set up before, or of what is being deleted.
    const now = findInterface(news.index);
    if (!now) return;
    this.#tap.name = now.name;
    const state = now.isUp ? "up" : "down";
    if (state !== this.#state) {
      this.#state = state;
      this.#tellNews({ type: state, name: this.name });
    }
    if (now.mtu !== this.#mtu) {
      this.#mtu = now.mtu;
      this.#tellNews({ type: "mtu", name: this.name, mtu: now.mtu });
    }
  }

  #tellNews(event: TapEvent): void {
    this.#options.onEvent(event);
    // A link whose pollers have ended needs no news.
    this.#change(() => undefined).catch(() => undefined);
  }

  /** A queue that cannot be attached is no fault of an interface that is gone; the news may come later than the error. */
  #observeFault(error: unknown): void {
    if (!(error instanceof SystemError)) throw error;
    if (this.#watch && findInterface(this.#index) === undefined) return;
    this.#options.onEvent({ type: "fault", name: this.name, error });
  }
}

/** @throws ConfigError if there is no bridge of that name */
function indexOfBridge(name: string): number {
  const found = findInterface(name);
  if (!found) throw new ConfigError(`bridge=${name}: there is no such interface; "ip link add ${name} type bridge"`);
  if (found.kind !== "bridge") throw new ConfigError(`bridge=${name}: that interface is no bridge`);
  return found.index;
}

function undo({ index, mtu, master, isUp }: NetworkInterface): void {
  try {
    changeInterface(index, { mtu, master, isUp }, "undoing changes");
  } catch {
    // the first error is the one to tell of
  }
}

/** TUN_F_* for what a driver acknowledged, in the combinations that the kernel takes. */
function offloadsFor(features: bigint): number {
  const has = (feature: number): boolean => ((features >> BigInt(feature)) & 1n) === 1n;
  const offloads = TAKEN.reduce((mask, [feature, offload]) => mask | (has(feature) ? offload : 0), 0);
  if ((offloads & TUN_F_CSUM) === 0) return 0;
  const withUso = (offloads & USO) === USO ? offloads : offloads & ~USO;
  return (offloads & (TUN_F_TSO4 | TUN_F_TSO6)) === 0 ? withUso & ~TUN_F_TSO_ECN : withUso;
}

function takesOffloads(fd: number, offloads: number): boolean {
  try {
    setOffloads(fd, offloads);
    return true;
  } catch {
    return false;
  }
}
