/**
 * A back-end and a front-end joined by a real socket, with real memory files and eventfds; the device records what the
 * session asks of it. Disposing checks that not one file descriptor is left behind.
 */
import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, vi } from "vitest";
import { eventfdCreate } from "../../native/eventfd.ts";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import * as L from "../../src/layout/vhost-user.ts";
import {
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_VERSION_1,
  VIRTIO_RING_F_EVENT_IDX,
} from "../../src/layout/virtio.ts";
import type { Device, MemoryRegion, Vring } from "../../src/vhost-user/device.ts";
import { decodeU64, encodeMessage } from "../../src/vhost-user/codec.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";
import { Server } from "../../src/vhost-user/server.ts";
import type { ServerEvent, ServerOptions } from "../../src/vhost-user/server.ts";

export const VERSION_1 = 1n << BigInt(VIRTIO_F_VERSION_1);
export const EVENT_IDX = 1n << BigInt(VIRTIO_RING_F_EVENT_IDX);
export const BIT_30 = 1n << BigInt(VHOST_USER_F_PROTOCOL_FEATURES);
export const REPLY_ACK = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_REPLY_ACK);
export const BACKEND_REQ = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_BACKEND_REQ);
export const MQ = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_MQ);
export const MEM_SLOTS = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS);
export const GPA_ADDRESSES = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES);
export const RESET_DEVICE = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_RESET_DEVICE);
export const INFLIGHT = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD);
export const RARP = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_RARP);
export const DEVICE_STATE = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_DEVICE_STATE);
export const BASE_INFLIGHT = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT);
export const SKIP_DRAIN = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN);
export const STATUS = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_STATUS);
/** What a front-end of today negotiates: all that is offered, but ring addresses are its own. */
export const USUAL_PROTOCOL_FEATURES =
  MQ |
  RARP |
  REPLY_ACK |
  BACKEND_REQ |
  INFLIGHT |
  RESET_DEVICE |
  MEM_SLOTS |
  STATUS |
  DEVICE_STATE |
  BASE_INFLIGHT |
  SKIP_DRAIN;

export type Call =
  | { name: "setFeatures"; features: bigint }
  | { name: "setMemory"; regions: MemoryRegion[]; vrings: Vring[] }
  | { name: "addMemory"; region: MemoryRegion }
  | { name: "removeMemory"; gpa: bigint }
  | { name: "startVring" | "updateVring"; vring: Vring }
  | { name: "stopVring"; index: number }
  | { name: "reset" };

/** Does nothing but remember, in the order asked; stops a ring at `stopIndex`. */
export class RecordingDevice implements Device {
  features = VERSION_1 | EVENT_IDX;
  readonly queuePairs = 2;
  memoryMaxBytes = 1n << 40n;
  queueUnit: Device["queueUnit"] = "pairs";
  config: Uint8Array | undefined;
  mtu: number | undefined;
  readonly announced: string[] = [];
  readonly calls: Call[] = [];
  stopIndex = 0;
  /** Called before a call completes; throwing refuses it, awaiting delays it. */
  before: (call: Call) => Promise<void> | void = () => {};

  announce(mac: Uint8Array) {
    this.announced.push(Buffer.from(mac).toString("hex"));
  }
  setMtu(mtu: number) {
    this.mtu = mtu;
  }
  setFeatures(features: bigint) {
    return this.#record({ name: "setFeatures", features });
  }
  setMemory(regions: readonly MemoryRegion[], vrings: readonly Vring[]) {
    return this.#record({ name: "setMemory", regions: [...regions], vrings: [...vrings] });
  }
  addMemory(region: MemoryRegion) {
    return this.#record({ name: "addMemory", region });
  }
  removeMemory(gpa: bigint) {
    return this.#record({ name: "removeMemory", gpa });
  }
  startVring(vring: Vring) {
    return this.#record({ name: "startVring", vring });
  }
  updateVring(vring: Vring) {
    return this.#record({ name: "updateVring", vring });
  }
  async stopVring(index: number) {
    await this.#record({ name: "stopVring", index });
    return this.stopIndex;
  }
  reset() {
    return this.#record({ name: "reset" });
  }

  /** The names of the calls since the last time this was read. */
  takeNames(): string[] {
    return this.calls.splice(0).map(({ name }) => name);
  }

  get lastVring(): Vring {
    const call = this.calls.findLast((each) => each.name === "startVring" || each.name === "updateVring");
    return (call as { vring: Vring }).vring;
  }

  async #record(call: Call): Promise<void> {
    await this.before(call);
    this.calls.push(call);
  }
}

export const MEMORY_SIZE = 1 << 20;
export const GPA = 0x1_4000_0000n;
export const USER_ADDRESS = 0x7f12_0000_0000n;
/** A ring of 256 entries at user addresses of the rig's region. */
export const AREAS = { desc: USER_ADDRESS, avail: USER_ADDRESS + 0x1000n, used: USER_ADDRESS + 0x2000n };
export const GPA_AREAS = { desc: GPA, avail: GPA + 0x1000n, used: GPA + 0x2000n };
export const RING_SIZE = 256;

export class Rig implements AsyncDisposable {
  readonly directory = mkdtempSync(join(tmpdir(), "vhost-user-"));
  readonly path = join(this.directory, "s");
  readonly device = new RecordingDevice();
  readonly events: ServerEvent[] = [];
  readonly #fdsBefore: number;
  readonly #own: number[] = [];
  readonly #frontends: Frontend[] = [];
  #server: Server | undefined;

  constructor() {
    this.#fdsBefore = openFds();
  }

  serve(options: Partial<ServerOptions> = {}): Server {
    const onEvent = (event: ServerEvent) => this.events.push(event);
    this.#server = new Server(this.device, { path: this.path, onEvent, ...options });
    return this.#server;
  }

  /** A new front-end that has said nothing yet. */
  connect(): Frontend {
    return this.adopt(Frontend.connect(this.path));
  }

  adopt(frontend: Frontend): Frontend {
    this.#frontends.push(frontend);
    return frontend;
  }

  memfd(sizeBytes = MEMORY_SIZE): number {
    return this.own(memfdCreate("guest", sizeBytes));
  }

  eventfd(): number {
    return this.own(eventfdCreate());
  }

  /** Closes the fd in the end. */
  own(fd: number): number {
    this.#own.push(fd);
    return fd;
  }

  region(fd = this.memfd(), sizeBytes = BigInt(MEMORY_SIZE)) {
    return { gpa: GPA, sizeBytes, userAddress: USER_ADDRESS, mmapOffset: 0n, fd };
  }

  get refusals(): string[] {
    return this.events.flatMap((event) => (event.type === "refusal" ? [event.request] : []));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const frontend of this.#frontends) frontend[Symbol.dispose]();
    await this.#server?.[Symbol.asyncDispose]();
    this.#own.forEach(close);
    rmSync(this.directory, { recursive: true, force: true });
    await vi.waitFor(() => expect(openFds(), "open file descriptors").toBe(this.#fdsBefore), { interval: 5 });
  }
}

/** A served rig whose front-end has negotiated. */
export async function negotiated(
  protocolFeatures = USUAL_PROTOCOL_FEATURES,
): Promise<{ rig: Rig; frontend: Frontend }> {
  const rig = new Rig();
  rig.serve();
  const frontend = rig.connect();
  await frontend.setProtocolFeatures(protocolFeatures);
  await frontend.setOwner();
  await frontend.setFeatures(VERSION_1 | BIT_30);
  return { rig, frontend };
}

/** The same with a memory table of one region and ring `index` ready but for its kick. */
export async function ready(
  index = 0,
  protocolFeatures = USUAL_PROTOCOL_FEATURES,
): Promise<{ rig: Rig; frontend: Frontend }> {
  const { rig, frontend } = await negotiated(protocolFeatures);
  await frontend.setMemTable([rig.region()]);
  await frontend.setVringNum(index, RING_SIZE);
  await frontend.setVringBase(index, 0);
  await frontend.setVringAddr(index, AREAS);
  await barrier(frontend);
  rig.device.takeNames();
  return { rig, frontend };
}

/** The same with ring `index` started. */
export async function started(
  index = 0,
  protocolFeatures = USUAL_PROTOCOL_FEATURES,
): Promise<{ rig: Rig; frontend: Frontend }> {
  const { rig, frontend } = await ready(index, protocolFeatures);
  await frontend.setVringKick(index, rig.eventfd());
  await barrier(frontend);
  rig.device.takeNames();
  return { rig, frontend };
}

/** Resolves once everything sent before has been handled: messages are processed in order. */
export async function barrier(frontend: Frontend): Promise<void> {
  await frontend.getFeatures();
}

/** Sends a request with NEED_REPLY by hand and returns the status of the ack. */
export async function ackOf(
  frontend: Frontend,
  id: number,
  payload: Uint8Array,
  fds: readonly number[] = [],
): Promise<bigint> {
  await frontend.send(encodeMessage(id, L.VHOST_USER_NEED_REPLY, payload), fds);
  const reply = await frontend.receive();
  expect(reply).toMatchObject({ request: id, flags: L.VHOST_USER_VERSION | L.VHOST_USER_REPLY });
  return decodeU64(reply?.payload as Buffer);
}

/** Resolves when the back-end has closed the connection without a word. */
export async function expectDropped(frontend: Frontend): Promise<void> {
  const message = await frontend.receive().catch((error: { code: string }) => {
    expect(error.code).toBe("ECONNRESET");
    return undefined;
  });
  expect(message).toBeUndefined();
}

export function openFds(): number {
  return readdirSync("/proc/self/fd").length;
}
