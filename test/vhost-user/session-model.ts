/**
 * What a session must answer to any sequence of messages, and what its device must have come to: the rules of
 * docs/PROTOCOL.md, 2 to 5, 7 and 17 once more, as plainly as they can be said, and without a line of the session's code.
 */
import * as L from "../../src/layout/vhost-user.ts";
import {
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_VERSION_1,
  VIRTIO_RING_F_EVENT_IDX,
} from "../../src/layout/virtio.ts";
import { FILE_BYTES, mask, OFFERED, RINGS, SHORT_BYTES } from "./session-commands.ts";
import type { Command, FdName } from "./session-commands.ts";

/** Nothing is sent, the connection is closed, or this payload is the reply (with so many fds). */
export type Expected = "nothing" | "drop" | { payload: Buffer; fds: number };

/** A ring that the device runs. */
export interface RunningRing {
  size: number;
  base: number;
  desc: bigint;
  avail: bigint;
  used: bigint;
  enabled: boolean;
  kick: boolean;
  call: boolean;
  err: boolean;
  /** Offset of its part of the inflight region. */
  inflight: bigint | undefined;
}

/** What the device was told. */
export interface DeviceView {
  features: bigint;
  regions: { gpa: bigint; sizeBytes: bigint; userAddress: bigint; mmapOffset: bigint }[];
  rings: (RunningRing | undefined)[];
}

interface Areas {
  desc: bigint;
  avail: bigint;
  used: bigint;
}

interface Ring {
  size: number;
  base: number | undefined;
  addresses: Areas | undefined;
  kicked: boolean;
  enabled: boolean;
  kick: boolean;
  call: boolean;
  err: boolean;
  running: RunningRing | undefined;
}

type Region = DeviceView["regions"][number] & { file: FdName };

/** What becomes of a refused request: a reply that says no, the end, or a nack and without acks the end or nothing. */
type Refusal = Buffer | "drop" | "nack or drop" | "nack or nothing";

interface Rule {
  refusal: Refusal;
  size?: number;
  gate?: number;
  obey?: (model: Model, command: Command) => Buffer | { payload: Buffer; fds: number } | void;
}

const BIT_30 = mask(VHOST_USER_F_PROTOCOL_FEATURES);
const END = 1n << 64n;
const MQ = 0;
const RARP = 2;
const ACK = 3;
const MTU = 4;
const BACKEND_REQ = 5;
const CONFIG = 9;
const INFLIGHT = 12;
const RESET = 13;
const INBAND = 14;
const SLOTS = 15;
const STATUS = 16;
const STATE = 19;
const BASE_INFLIGHT = 20;
const GPA = 21;
const SKIP_DRAIN = 23;
const PROTOCOL = mask(
  MQ,
  RARP,
  ACK,
  MTU,
  BACKEND_REQ,
  INFLIGHT,
  RESET,
  SLOTS,
  STATUS,
  STATE,
  BASE_INFLIGHT,
  GPA,
  SKIP_DRAIN,
);
const ANNOUNCEMENTS_AT_ONCE = 16;

class Refused extends Error {}
class Dropped extends Error {}
/** What comes of the command depends on the time: the sequence ends before it. */
export class Undecided extends Error {}

function refuseIf(wrong: boolean): void {
  if (wrong) throw new Refused();
}

/** Where the test's device stops a ring that it started at `base`. */
export function stopBase(base: number, isPacked: boolean): number {
  return isPacked ? base : (base + 3) & 0xffff;
}

export class Model {
  features: bigint | undefined;
  featuresRefused = false;
  protocol = 0n;
  status = 0;
  regions: Region[] = [];
  /** Regions that were added although they were there. */
  repeats: Region[] = [];
  inflight: { bytes: bigint; offset: bigint; queues: number; entries: number } | undefined;
  announcements = 0;
  readonly rings: Ring[] = Array.from({ length: RINGS }, () => ({
    size: 0,
    base: undefined,
    addresses: undefined,
    kicked: false,
    enabled: false,
    kick: false,
    call: false,
    err: false,
    running: undefined,
  }));

  /** What must come of the command. */
  handle(command: Command): Expected {
    const rule = RULES.get(command.request) ?? { refusal: "nack or nothing" };
    const couldAck = this.has(ACK);
    try {
      refuseIf(rule.obey === undefined);
      refuseIf(rule.gate !== undefined && !this.has(rule.gate));
      refuseIf(rule.size !== undefined && command.payload.length !== rule.size);
      const reply = rule.obey?.(this, command);
      if (Buffer.isBuffer(reply)) return { payload: reply, fds: 0 };
      if (reply) return reply;
      return command.ack && (couldAck || this.has(ACK)) ? { payload: u64(0n), fds: 0 } : "nothing";
    } catch (error) {
      if (error instanceof Dropped) return "drop";
      if (!(error instanceof Refused)) throw error;
      if (Buffer.isBuffer(rule.refusal)) return { payload: rule.refusal, fds: 0 };
      if (rule.refusal === "drop") return "drop";
      if (command.ack && this.has(ACK)) return { payload: u64(1n), fds: 0 };
      return rule.refusal === "nack or drop" ? "drop" : "nothing";
    }
  }

  /** What the device must have been told by now. */
  get device(): DeviceView {
    return {
      features: (this.features ?? 0n) & ~BIT_30,
      regions: this.regions.map(({ file: _file, ...region }) => region),
      rings: this.rings.map(({ running }) => running),
    };
  }

  has(protocolFeature: number): boolean {
    return (this.protocol & mask(protocolFeature)) !== 0n;
  }

  get isPacked(): boolean {
    return ((this.features ?? 0n) & mask(VIRTIO_F_RING_PACKED)) !== 0n;
  }

  get isRunning(): boolean {
    return this.rings.some(({ running }) => running);
  }

  ring(index: number): Ring {
    refuseIf(index >= RINGS);
    return this.rings[index] as Ring;
  }

  stoppedRing(index: number): Ring {
    const ring = this.ring(index);
    refuseIf(ring.running !== undefined);
    return ring;
  }

  isSize(size: number): boolean {
    return size >= 1 && size <= 32768 && (this.isPacked || Number.isInteger(Math.log2(size)));
  }

  baseOf(ring: Ring): number {
    return ring.base ?? (this.isPacked ? 0x8000 : 0);
  }

  misaligned({ desc, avail, used }: Areas): boolean {
    return desc % 16n !== 0n || avail % (this.isPacked ? 4n : 2n) !== 0n || used % 4n !== 0n;
  }

  /** Guest physical addresses of the areas, if the ring could run there. */
  translate(ring: Ring, regions: readonly Region[]): Areas | undefined {
    const { size, addresses } = ring;
    if (size === 0 || !addresses) return undefined;
    const event = ((this.features ?? 0n) & mask(VIRTIO_RING_F_EVENT_IDX)) === 0n ? 0 : 2;
    const find = (at: bigint, bytes: number): bigint | undefined => {
      for (const region of regions) {
        const start = this.has(GPA) ? region.gpa : region.userAddress;
        if (at >= start && at + BigInt(bytes) <= start + region.sizeBytes) return at - start + region.gpa;
      }
      return undefined;
    };
    const desc = find(addresses.desc, 16 * size);
    const avail = find(addresses.avail, this.isPacked ? 4 : 4 + 2 * size + event);
    const used = find(addresses.used, this.isPacked ? 4 : 4 + 8 * size + event);
    if (desc === undefined || avail === undefined || used === undefined) return undefined;
    return this.misaligned({ desc, avail, used }) ? undefined : { desc, avail, used };
  }

  /** A kicked ring starts when all of it is known. */
  start(ring: Ring): void {
    if (!ring.kicked || ring.running) return;
    const areas = this.translate(ring, this.regions);
    if (!areas) return;
    refuseIf(!this.isSize(ring.size));
    refuseIf(this.isPacked && (this.baseOf(ring) & 0x7fff) >= ring.size);
    const inflight = this.inflightOf(ring);
    const { size, enabled, kick, call, err } = ring;
    ring.running = { size, base: this.baseOf(ring), ...areas, enabled, kick, call, err, inflight };
  }

  inflightOf(ring: Ring): bigint | undefined {
    const index = this.rings.indexOf(ring);
    if (!this.inflight || index >= this.inflight.queues) return undefined;
    refuseIf(ring.size > this.inflight.entries);
    refuseIf(this.inflight.bytes < BigInt(this.inflight.queues * this.stride(this.inflight.entries)));
    return this.inflight.offset + BigInt(index * this.stride(this.inflight.entries));
  }

  stride(entries: number): number {
    return Math.ceil((this.isPacked ? 32 + 32 * entries : 16 + 16 * entries) / 64) * 64;
  }

  pause(ring: Ring): void {
    if (!ring.running) return;
    ring.base = stopBase(ring.running.base, this.isPacked);
    ring.running = undefined;
  }

  stop(ring: Ring): void {
    this.pause(ring);
    Object.assign(ring, { kicked: false, addresses: undefined, kick: false, call: false });
  }

  reset(): void {
    for (const ring of this.rings) {
      this.stop(ring);
      Object.assign(ring, { size: 0, base: undefined, enabled: false });
    }
    this.features = undefined;
    this.featuresRefused = false;
    this.status = 0;
  }

  setMemory(regions: Region[]): void {
    const placed = this.rings.map((ring) => (ring.running ? this.translate(ring, regions) : undefined));
    for (const [index, ring] of this.rings.entries()) {
      const areas = placed[index];
      if (ring.running && areas) Object.assign(ring.running, areas);
      else this.pause(ring);
    }
    this.regions = regions;
    try {
      for (const ring of this.rings) this.start(ring);
    } catch (error) {
      throw error instanceof Refused ? new Dropped() : error;
    }
  }

  /** A region that may join the others. */
  checkRegion(region: Region, others: readonly Region[]): Region {
    const { gpa, sizeBytes, userAddress, mmapOffset, file } = region;
    refuseIf(sizeBytes === 0n || [gpa, userAddress, mmapOffset].some((start) => start + sizeBytes >= END));
    refuseIf((gpa - mmapOffset) % 16n !== 0n);
    for (const other of others) {
      for (const space of ["gpa", "userAddress"] as const) {
        refuseIf(region[space] < other[space] + other.sizeBytes && other[space] < region[space] + sizeBytes);
      }
    }
    refuseIf(mmapOffset + sizeBytes > BigInt(memoryBytes(file)));
    return region;
  }
}

/** How long the file is, if it is one that can be guest memory. */
function memoryBytes(file: FdName): number {
  if (file === "memory0" || file === "memory1") return FILE_BYTES;
  return file === "short" ? SHORT_BYTES : -1;
}

function u64(value: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(value);
  return bytes;
}

function regionAt(payload: Buffer, at: number, file: FdName): Region {
  const [gpa, sizeBytes, userAddress, mmapOffset] = [0, 8, 16, 24].map((field) => payload.readBigUInt64LE(at + field));
  return { gpa, sizeBytes, userAddress, mmapOffset, file } as Region;
}

/** Gives a ring its size or its addresses. */
function configure(model: Model, ring: Ring, values: Partial<Ring>): void {
  const { size, addresses } = ring;
  Object.assign(ring, values);
  try {
    refuseIf(
      values.addresses !== undefined &&
        ring.size > 0 &&
        model.regions.length > 0 &&
        !model.translate(ring, model.regions),
    );
    model.start(ring);
  } catch (error) {
    Object.assign(ring, { size, addresses });
    throw error;
  }
}

function setVringFd(which: "kick" | "call" | "err"): Rule {
  const kinds: FdName[] = which === "kick" ? ["eventfd"] : ["eventfd", "socket"];
  return {
    size: 8,
    refusal: which === "err" ? "nack or nothing" : "nack or drop",
    obey(model, { payload, fds }) {
      const value = payload.readBigUInt64LE();
      const [fd] = fds;
      refuseIf(value > 0x1ffn || fds.length !== (value & 0x100n ? 0 : 1));
      const ring = model.ring(Number(value & 0xffn));
      refuseIf(fd !== undefined && !kinds.includes(fd));
      const before = { [which]: ring[which], kicked: ring.kicked };
      ring[which] = fd !== undefined;
      ring.kicked ||= which === "kick";
      try {
        if (ring.running) ring.running[which] = ring[which];
        else model.start(ring);
      } catch (error) {
        Object.assign(ring, before);
        throw error;
      }
    },
  };
}

const getVringBase: Rule = {
  size: 8,
  refusal: "drop",
  obey(model, { payload }) {
    const index = payload.readUInt32LE();
    const ring = model.ring(index);
    model.stop(ring);
    const base = model.baseOf(ring);
    const reply = Buffer.alloc(8);
    reply.writeUInt32LE(index);
    reply.writeUInt32LE(model.isPacked ? base * 0x10001 : base, 4);
    return reply;
  },
};

const not = (refusal: Refusal): Rule => ({ refusal });

const RULES = new Map<number, Rule>([
  [L.VHOST_USER_GET_FEATURES, { size: 0, refusal: "drop", obey: () => u64(OFFERED | BIT_30) }],
  [
    L.VHOST_USER_SET_FEATURES,
    {
      size: 8,
      refusal: "nack or drop",
      obey(model, { payload }) {
        const features = payload.readBigUInt64LE();
        model.featuresRefused = true;
        refuseIf((features & ~(OFFERED | BIT_30)) !== 0n);
        refuseIf((features & mask(VIRTIO_F_RING_PACKED)) !== 0n && (features & mask(VIRTIO_F_VERSION_1)) === 0n);
        refuseIf(model.isRunning && features !== model.features);
        if (!model.isRunning) {
          model.features = features;
          if ((features & BIT_30) === 0n) for (const ring of model.rings) ring.enabled = true;
        }
        model.featuresRefused = false;
      },
    },
  ],
  [L.VHOST_USER_SET_OWNER, { size: 0, refusal: "nack or nothing", obey() {} }],
  [L.VHOST_USER_RESET_OWNER, { size: 0, refusal: "nack or nothing", obey() {} }],
  [
    L.VHOST_USER_SET_MEM_TABLE,
    {
      refusal: "nack or drop",
      obey(model, { payload, fds }) {
        const count = payload.length < 8 ? 0 : payload.readUInt32LE();
        refuseIf(count < 1 || count > 8 || payload.length < 8 + 32 * count || (payload.length - 8) % 32 !== 0);
        refuseIf(fds.length !== count);
        const regions: Region[] = [];
        for (const [i, fd] of fds.entries()) {
          regions.push(model.checkRegion(regionAt(payload, 8 + 32 * i, fd), regions));
        }
        const isSame = isDeepEqual(regions, model.regions);
        if (isSame) return;
        model.setMemory(regions);
        model.repeats = [];
      },
    },
  ],
  [L.VHOST_USER_SET_LOG_BASE, not("nack or drop")],
  [L.VHOST_USER_SET_LOG_FD, not("nack or nothing")],
  [
    L.VHOST_USER_SET_VRING_NUM,
    {
      size: 8,
      refusal: "nack or drop",
      obey(model, { payload }) {
        const ring = model.stoppedRing(payload.readUInt32LE());
        const size = payload.readUInt32LE(4);
        refuseIf(!model.isSize(size));
        configure(model, ring, { size });
      },
    },
  ],
  [
    L.VHOST_USER_SET_VRING_ADDR,
    {
      size: 40,
      refusal: "nack or drop",
      obey(model, { payload }) {
        const [desc, used, avail] = [8, 16, 24].map((at) => payload.readBigUInt64LE(at)) as [bigint, bigint, bigint];
        const addresses = { desc, avail, used };
        refuseIf(payload.readUInt32LE(4) !== 0 || model.misaligned(addresses));
        const ring = model.ring(payload.readUInt32LE());
        if (ring.running && isDeepEqual(ring.addresses, addresses)) return;
        configure(model, model.stoppedRing(payload.readUInt32LE()), { addresses });
      },
    },
  ],
  [
    L.VHOST_USER_SET_VRING_BASE,
    {
      size: 8,
      refusal: "nack or drop",
      obey(model, { payload }) {
        const ring = model.stoppedRing(payload.readUInt32LE());
        const num = payload.readUInt32LE(4);
        refuseIf(!model.isPacked && num > 0xffff);
        const base = num > 0xffff ? num >>> 16 : num;
        refuseIf(model.isPacked && ring.size > 0 && (base & 0x7fff) >= ring.size);
        ring.base = base;
      },
    },
  ],
  [L.VHOST_USER_GET_VRING_BASE, getVringBase],
  [L.VHOST_USER_GET_VRING_BASE_SKIP_DRAIN, { ...getVringBase, gate: SKIP_DRAIN }],
  [L.VHOST_USER_SET_VRING_KICK, setVringFd("kick")],
  [L.VHOST_USER_SET_VRING_CALL, setVringFd("call")],
  [L.VHOST_USER_SET_VRING_ERR, setVringFd("err")],
  [L.VHOST_USER_GET_PROTOCOL_FEATURES, { size: 0, refusal: "drop", obey: () => u64(PROTOCOL) }],
  [
    L.VHOST_USER_SET_PROTOCOL_FEATURES,
    {
      size: 8,
      refusal: "nack or drop",
      obey(model, { payload }) {
        const features = payload.readBigUInt64LE();
        const has = (bit: number) => (features & mask(bit)) !== 0n;
        if (has(INBAND) && !(has(ACK) && has(BACKEND_REQ))) throw new Dropped();
        refuseIf((features & ~PROTOCOL) !== 0n);
        refuseIf(has(BASE_INFLIGHT) && !has(INFLIGHT));
        refuseIf(has(SKIP_DRAIN) && !has(BASE_INFLIGHT));
        model.protocol = features;
      },
    },
  ],
  [L.VHOST_USER_GET_QUEUE_NUM, { size: 0, refusal: "drop", gate: MQ, obey: () => u64(BigInt(RINGS / 2)) }],
  [
    L.VHOST_USER_SET_VRING_ENABLE,
    {
      size: 8,
      refusal: "nack or drop",
      obey(model, { payload }) {
        const ring = model.ring(payload.readUInt32LE());
        const num = payload.readUInt32LE(4);
        refuseIf(num > 1 || (model.features !== undefined && (model.features & BIT_30) === 0n));
        ring.enabled = num === 1;
        if (ring.running) ring.running.enabled = ring.enabled;
      },
    },
  ],
  [
    L.VHOST_USER_SEND_RARP,
    {
      size: 8,
      refusal: "nack or nothing",
      gate: RARP,
      obey(model, { payload }) {
        refuseIf(((payload[0] ?? 0) & 1) === 1 || payload.subarray(0, 6).every((byte) => byte === 0));
        if (model.announcements++ === ANNOUNCEMENTS_AT_ONCE) throw new Undecided();
      },
    },
  ],
  [
    L.VHOST_USER_NET_SET_MTU,
    {
      size: 8,
      refusal: "nack or nothing",
      gate: MTU,
      obey: (_model, { payload }) => refuseIf(payload.readBigUInt64LE() < 68n || payload.readBigUInt64LE() > 65535n),
    },
  ],
  [
    L.VHOST_USER_SET_BACKEND_REQ_FD,
    {
      size: 0,
      refusal: "nack or nothing",
      gate: BACKEND_REQ,
      obey: (_model, { fds }) => refuseIf(fds.length !== 1 || fds[0] !== "socket"),
    },
  ],
  [L.VHOST_USER_IOTLB_MSG, not(u64(1n))],
  [L.VHOST_USER_SET_VRING_ENDIAN, not("nack or drop")],
  [L.VHOST_USER_GET_CONFIG, { refusal: Buffer.alloc(0), gate: CONFIG }],
  [L.VHOST_USER_SET_CONFIG, not("nack or nothing")],
  [L.VHOST_USER_CREATE_CRYPTO_SESSION, not("drop")],
  [L.VHOST_USER_CLOSE_CRYPTO_SESSION, not("nack or nothing")],
  [L.VHOST_USER_POSTCOPY_ADVISE, not("drop")],
  [L.VHOST_USER_POSTCOPY_LISTEN, not("nack or drop")],
  [L.VHOST_USER_POSTCOPY_END, not(u64(1n))],
  [
    L.VHOST_USER_GET_INFLIGHT_FD,
    {
      size: 24,
      refusal: Buffer.alloc(24),
      gate: INFLIGHT,
      obey(model, { payload, fds }) {
        const [queues, entries] = [payload.readUInt16LE(16), payload.readUInt16LE(18)];
        refuseIf(fds.length > 0 || queues < 1 || queues > RINGS || entries < 1 || entries > 32768);
        const reply = Buffer.alloc(24);
        reply.writeBigUInt64LE(BigInt(Math.ceil((queues * model.stride(entries)) / 4096) * 4096));
        payload.copy(reply, 16, 16, 20);
        return { payload: reply, fds: 1 };
      },
    },
  ],
  [
    L.VHOST_USER_SET_INFLIGHT_FD,
    {
      size: 24,
      refusal: "nack or nothing",
      gate: INFLIGHT,
      obey(model, { payload, fds }) {
        const [bytes, offset] = [payload.readBigUInt64LE(), payload.readBigUInt64LE(8)];
        const [queues, entries] = [payload.readUInt16LE(16), payload.readUInt16LE(18)];
        refuseIf(fds.length !== 1 || queues < 1 || queues > RINGS || entries < 1 || entries > 32768);
        refuseIf(offset % 4096n !== 0n || offset + bytes > BigInt(memoryBytes(fds[0] as FdName)));
        refuseIf(bytes < BigInt(queues * model.stride(entries)));
        refuseIf(model.isRunning);
        model.inflight = { bytes, offset, queues, entries };
      },
    },
  ],
  [L.VHOST_USER_GPU_SET_SOCKET, not("nack or nothing")],
  [L.VHOST_USER_RESET_DEVICE, { size: 0, refusal: "nack or drop", gate: RESET, obey: (model) => model.reset() }],
  [L.VHOST_USER_VRING_KICK, not("nack or drop")],
  [L.VHOST_USER_GET_MAX_MEM_SLOTS, { size: 0, refusal: "drop", gate: SLOTS, obey: () => u64(509n) }],
  [
    L.VHOST_USER_ADD_MEM_REG,
    {
      size: 40,
      refusal: "nack or drop",
      gate: SLOTS,
      obey(model, { payload, fds }) {
        refuseIf(fds.length !== 1);
        // "readonly" is memory0's file, opened otherwise
        const [fd] = fds as [FdName];
        const added = regionAt(payload, 8, fd);
        const again = { ...added, file: fd === "readonly" ? "memory0" : fd };
        if (model.regions.some((each) => isDeepEqual(each, again))) model.repeats.push(added);
        else model.setMemory([...model.regions, model.checkRegion(added, model.regions)]);
      },
    },
  ],
  [
    L.VHOST_USER_REM_MEM_REG,
    {
      size: 40,
      refusal: "nack or drop",
      gate: SLOTS,
      obey(model, { payload }) {
        const { gpa, sizeBytes, userAddress } = regionAt(payload, 8, "memory0");
        const isOther = (each: Region) =>
          each.gpa !== gpa || each.sizeBytes !== sizeBytes || each.userAddress !== userAddress;
        const others = model.regions.filter(isOther);
        refuseIf(others.length === model.regions.length);
        const repeat = model.repeats.findIndex((each) => !isOther(each));
        if (repeat >= 0) model.repeats.splice(repeat, 1);
        else model.setMemory(others);
      },
    },
  ],
  [
    L.VHOST_USER_SET_STATUS,
    {
      size: 8,
      refusal: "nack or nothing",
      gate: STATUS,
      obey(model, { payload }) {
        const status = payload.readBigUInt64LE();
        refuseIf(status > 255n);
        if (status === 0n) model.reset();
        model.status = model.featuresRefused ? Number(status) & ~8 : Number(status);
      },
    },
  ],
  [L.VHOST_USER_GET_STATUS, { size: 0, refusal: "drop", gate: STATUS, obey: (model) => u64(BigInt(model.status)) }],
  [L.VHOST_USER_GET_SHARED_OBJECT, not("drop")],
  // Without a SET_DEVICE_STATE_FD before it, which no sequence has
  [L.VHOST_USER_CHECK_DEVICE_STATE, { size: 0, refusal: u64(1n), gate: STATE, obey: () => refuseIf(true) }],
  [L.VHOST_USER_GET_SHMEM_CONFIG, not("drop")],
]);

/** Of plain data. */
function isDeepEqual(a: unknown, b: unknown): boolean {
  const plain = (value: unknown) =>
    JSON.stringify(value, (_key, part) => (typeof part === "bigint" ? `${part}` : part));
  return plain(a) === plain(b);
}
