/**
 * The vhost-user port: a VM. It is the device that a vhost-user session drives, and an end that lanes work on.
 *
 * Main thread. Every change goes through the link, which parks the lanes first; so when a promise of this device
 * settles, the pollers already work by the new state, and the session may acknowledge.
 */
import { ProtocolError } from "../errors.ts";
import { VRING_ENABLED, VRING_EVENT_IDX, VRING_INDIRECT, VRING_MERGEABLE, VRING_PACKED } from "../layout/lane.ts";
import {
  NET_CONFIG_MAC,
  NET_CONFIG_MAX_VIRTQUEUE_PAIRS,
  NET_CONFIG_MTU,
  NET_CONFIG_SIZE,
  NET_CONFIG_STATUS,
  NET_HDR_SIZE,
  NET_HDR_SIZE_LEGACY,
  USED_IDX,
  VIRTIO_F_ANY_LAYOUT,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_RING_RESET,
  VIRTIO_F_VERSION_1,
  VIRTIO_NET_F_GUEST_ANNOUNCE,
  VIRTIO_NET_F_MAC,
  VIRTIO_NET_F_MQ,
  VIRTIO_NET_F_MRG_RXBUF,
  VIRTIO_NET_F_MTU,
  VIRTIO_NET_S_LINK_UP,
  VIRTIO_RING_F_EVENT_IDX,
  VIRTIO_RING_F_INDIRECT_DESC,
} from "../layout/virtio.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { areaSizes, ringForm, type Areas } from "../vhost-user/areas.ts";
import type { Device, MemoryRegion, Vring } from "../vhost-user/device.ts";
import { startPosition } from "../vhost-user/position.ts";
import { Server, type ServerEvent } from "../vhost-user/server.ts";
import { giveBackCutBatch } from "./cut-batch.ts";
import type { Area, GuestPort, InflightPlace, LinkSide, RunningVring } from "./port.ts";
import { offloadsOf } from "./offloads.ts";
import type { Recovery } from "./inflight-file.ts";
import { rarpFrame } from "./rarp.ts";
import { recoverPacked } from "./recover-packed.ts";
import { recoverSplit } from "./recover-split.ts";
import { areaView, packedFlags } from "./ring-memory.ts";
import { MEMORY_MAX_BYTES, type VhostUserSpec } from "./spec.ts";

/** Virtio features offered whatever the number of queues, and whatever is at the other end. */
const FEATURES = [
  VIRTIO_NET_F_MRG_RXBUF,
  VIRTIO_F_ANY_LAYOUT,
  VIRTIO_RING_F_INDIRECT_DESC,
  VIRTIO_RING_F_EVENT_IDX,
  VIRTIO_F_VERSION_1,
  VIRTIO_F_RING_PACKED,
  // The core gives chains back in the order in which it took them.
  VIRTIO_F_IN_ORDER,
  // The reset of one virtqueue is its stop and start here.
  VIRTIO_F_RING_RESET,
];

interface VhostUserOptions extends Omit<VhostUserSpec, "kind" | "text"> {
  spec: string;
  onEvent: (event: ServerEvent) => void;
}

export class VhostUserPort implements GuestPort, Device {
  readonly kind = "vhost-user";
  readonly spec: string;
  readonly queuePairs: number;
  readonly queueUnit: Device["queueUnit"];
  readonly memoryMaxBytes: bigint;
  readonly memory = new GuestMemory();
  readonly #options: VhostUserOptions;
  readonly #vrings = new Map<number, RunningVring>();
  #acknowledged = 0n;
  #frontendMtu: number | undefined;
  #connected = false;
  #ended = false;
  #server: Server | undefined;
  #link: LinkSide | undefined;

  constructor(options: VhostUserOptions) {
    this.#options = options;
    this.spec = options.spec;
    this.queuePairs = options.queuePairs;
    this.queueUnit = options.queueUnit;
    this.memoryMaxBytes = options.memoryMaxBytes ?? MEMORY_MAX_BYTES;
  }

  get features(): bigint {
    const { queuePairs, guestAnnounce, mac, mtu } = this.#options;
    const bits = [...FEATURES, ...(this.#link?.offloads ?? [])];
    if (queuePairs > 1) bits.push(VIRTIO_NET_F_MQ);
    if (guestAnnounce) bits.push(VIRTIO_NET_F_GUEST_ANNOUNCE);
    if (mac) bits.push(VIRTIO_NET_F_MAC);
    if (mtu !== undefined) bits.push(VIRTIO_NET_F_MTU);
    return bits.reduce((mask, bit) => mask | (1n << BigInt(bit)), 0n);
  }

  get acknowledged(): bigint {
    return this.#acknowledged;
  }

  /** The guest's MTU as far as it is known: what the front-end said, else what the user said. */
  get mtu(): number | undefined {
    return this.#frontendMtu ?? this.#options.mtu;
  }

  /** Served only if the user gave a MAC address or an MTU: a front-end's own space is otherwise the better one. */
  get config(): Uint8Array | undefined {
    const { mac } = this.#options;
    if (mac === undefined && this.mtu === undefined) return undefined;
    const bytes = new Uint8Array(NET_CONFIG_SIZE);
    const view = new DataView(bytes.buffer);
    bytes.set(mac ?? [], NET_CONFIG_MAC);
    view.setUint16(NET_CONFIG_STATUS, VIRTIO_NET_S_LINK_UP, true);
    view.setUint16(NET_CONFIG_MAX_VIRTQUEUE_PAIRS, this.queuePairs, true);
    view.setUint16(NET_CONFIG_MTU, this.mtu ?? 0, true);
    return bytes;
  }

  get state(): GuestPort["state"] {
    if (this.#connected) return this.#vrings.size > 0 ? "running" : "connected";
    if (this.#ended) return "ended";
    const { socket } = this.#options;
    return "connect" in socket && socket.connect ? "connecting" : "listening";
  }

  vring(index: number): RunningVring | undefined {
    return this.#vrings.get(index);
  }

  async open(link: LinkSide): Promise<void> {
    this.#link = link;
    this.#server = new Server(this, { ...this.#options.socket, onEvent: (event) => this.#observe(event) });
  }

  async close(): Promise<void> {
    await this.#server?.[Symbol.asyncDispose]();
  }

  announce(mac: Uint8Array): void {
    this.#link?.inject(rarpFrame(mac));
  }

  setMtu(mtu: number): void {
    this.#frontendMtu = mtu;
  }

  async setFeatures(features: bigint): Promise<void> {
    this.#acknowledged = features;
  }

  setMemory(regions: readonly MemoryRegion[], vrings: readonly Vring[]): Promise<void> {
    return this.#change(() => {
      this.memory.setRegions(regions);
      for (const vring of vrings) this.#setVring(vring, this.#vrings.get(vring.index)?.start);
    });
  }

  addMemory(region: MemoryRegion): Promise<void> {
    return this.#change(() => this.memory.addRegion(region));
  }

  removeMemory(gpa: bigint): Promise<void> {
    return this.#change(() => this.memory.removeRegion(gpa));
  }

  startVring(vring: Vring): Promise<void> {
    return this.#change(() => this.#setVring(vring, undefined));
  }

  async stopVring(index: number): Promise<number> {
    let next = 0;
    await this.#change(() => {
      next = this.#link?.nextAvail(index) ?? 0;
      this.#vrings.delete(index);
    });
    return next;
  }

  updateVring(vring: Vring): Promise<void> {
    return this.#change(() => this.#setVring(vring, this.#vrings.get(vring.index)?.start));
  }

  #change(apply: () => void): Promise<void> {
    return this.#link?.change(apply) ?? Promise.reject(new Error("the port is not open"));
  }

  reset(): Promise<void> {
    return this.#change(() => {
      this.#vrings.clear();
      this.memory.clear();
      this.#acknowledged = 0n;
      this.#frontendMtu = undefined;
    });
  }

  /** @param start the start of a virtqueue that runs; undefined: it starts now */
  #setVring(vring: Vring, start: symbol | undefined): void {
    const { index, size, kick, call, err } = vring;
    const form = ringForm(this.#acknowledged);
    const sizes = areaSizes(size, form);
    const running: RunningVring = {
      start: start ?? Symbol(`start of virtqueue ${index}`),
      size,
      base: vring.base,
      desc: this.#area(vring.desc, sizes.desc, index),
      avail: this.#area(vring.avail, sizes.avail, index),
      used: this.#area(vring.used, sizes.used, index),
      headerBytes:
        this.#has(VIRTIO_F_VERSION_1) || this.#has(VIRTIO_NET_F_MRG_RXBUF) ? NET_HDR_SIZE : NET_HDR_SIZE_LEGACY,
      offloads: offloadsOf(index, (feature) => this.#has(feature)),
      flags:
        (vring.enabled ? VRING_ENABLED : 0) |
        (form.isPacked ? VRING_PACKED : 0) |
        (form.hasEventIndex ? VRING_EVENT_IDX : 0) |
        (this.#has(VIRTIO_RING_F_INDIRECT_DESC) ? VRING_INDIRECT : 0) |
        (this.#has(VIRTIO_NET_F_MRG_RXBUF) ? VRING_MERGEABLE : 0),
      kick,
      call,
      err,
    };
    if (start === undefined) this.#resume(running, sizes, vring.inflight);
    else running.inflight = this.#vrings.get(index)?.inflight;
    this.#vrings.set(index, running);
  }

  /**
   * Finds out where a virtqueue goes on, and gives back what another back-end left in flight. Nothing is ever in flight here, so a
   * split ring goes on at its used index: the base of a front-end whose back-end was killed is an old one, or 0 (DPDK).
   */
  #resume(vring: RunningVring, sizes: Record<keyof Areas, number>, inflight: InflightPlace | undefined): void {
    const isPacked = (vring.flags & VRING_PACKED) !== 0;
    const desc = areaView(this.memory, vring.desc, sizes.desc);
    const used = areaView(this.memory, vring.used, sizes.used);
    const recovery =
      inflight &&
      this.#orComplain(() =>
        isPacked ? recoverPacked(inflight, vring.size, desc, vring.base) : recoverSplit(inflight, vring.size, used),
      );
    if (recovery) {
      vring.base = recovery.position;
      vring.inflight = inflight;
    } else {
      vring.base = isPacked ? startPosition(vring.base, packedFlags(desc)) : used.getUint16(USED_IDX, true);
    }
    if (isPacked) vring.base = giveBackCutBatch(desc, vring.base);
  }

  /** An inflight region of no use costs the ring nothing but what might have been given back by it. */
  #orComplain(recover: () => Recovery): Recovery | undefined {
    const complain = (error: ProtocolError) =>
      this.#options.onEvent({ type: "refusal", request: "SET_INFLIGHT_FD", error });
    try {
      const recovery = recover();
      if (recovery.complaint !== undefined)
        complain(new ProtocolError(`${recovery.complaint}; nothing is given back by it`));
      return recovery;
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      complain(error);
      return undefined;
    }
  }

  #area(gpa: bigint, sizeBytes: number, index: number): Area {
    const area = this.memory.locate(gpa, BigInt(sizeBytes));
    if (area) return area;
    throw new ProtocolError(
      `virtqueue ${index}: an area of ${sizeBytes} bytes at gpa 0x${gpa.toString(16)} is not in one region`,
    );
  }

  #has(bit: number): boolean {
    return ((this.#acknowledged >> BigInt(bit)) & 1n) === 1n;
  }

  #observe(event: ServerEvent): void {
    if (event.type === "connect") this.#connected = true;
    if (event.type === "disconnect") this.#connected = false;
    if (event.type === "end") this.#ended = true;
    this.#options.onEvent(event);
  }
}
