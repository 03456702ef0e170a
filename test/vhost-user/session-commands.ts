/**
 * The messages of random sessions: most of them legal on their own, in any order; some never legal. A command is plain
 * data, so that a sequence can be shrunk, printed and kept. The world they speak of is small on purpose: four rings, a few
 * regions that touch or overlap, a few addresses, so that random messages meet.
 */
import fc from "fast-check";
import * as L from "../../src/layout/vhost-user.ts";
import {
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_VERSION_1,
  VIRTIO_NET_F_MTU,
  VIRTIO_RING_F_EVENT_IDX,
} from "../../src/layout/virtio.ts";

/** What can come along as an fd. */
export type FdName = "eventfd" | "socket" | "pipe" | "memory0" | "memory1" | "readonly" | "short";

export interface Command {
  request: number;
  /** NEED_REPLY */
  ack: boolean;
  payload: Buffer;
  fds: FdName[];
}

export const RINGS = 4;
export const PAGE = 0x1000n;
export const REGION_BYTES = 0x10000n;
/** Length of the memory files, and of "short". */
export const FILE_BYTES = 0x30000;
export const SHORT_BYTES = 0x8000;
export const USER = 0x7000_0000n;
export const OFFERED = mask(VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_F_RING_PACKED, VIRTIO_NET_F_MTU);
const BIT_30 = mask(VHOST_USER_F_PROTOCOL_FEATURES);

export function mask(...bits: number[]): bigint {
  return bits.reduce((sum, bit) => sum | (1n << BigInt(bit)), 0n);
}

const index = fc.oneof(
  { weight: 60, arbitrary: fc.nat(RINGS - 1) },
  { weight: 1, arbitrary: fc.constantFrom(RINGS, 0xff, 0x10000, 0x80000001, 0xffffffff) },
);
const goodSize = fc.constantFrom(1, 2, 256, 256, 256);
const size = fc.oneof(goodSize, fc.constantFrom(0, 3, 300, 512, 32768, 32769, 0x10100));
const goodBase = fc.constantFrom(0, 0x8000, 0x8000_8000);
const base = fc.oneof(goodBase, fc.constantFrom(1, 5, 255, 0xffff, 0x10000, 0x8001_8001, 0x8005_0002, 0xffff_ffff));
const features = fc.constantFrom(
  0n,
  mask(VIRTIO_F_VERSION_1),
  mask(VIRTIO_F_VERSION_1) | BIT_30,
  mask(VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX) | BIT_30,
  mask(VIRTIO_F_VERSION_1, VIRTIO_F_RING_PACKED) | BIT_30,
  mask(VIRTIO_F_RING_PACKED) | BIT_30,
  mask(40) | BIT_30,
);
const ACK = L.VHOST_USER_PROTOCOL_F_REPLY_ACK;
const USUAL = mask(
  L.VHOST_USER_PROTOCOL_F_MQ,
  ACK,
  L.VHOST_USER_PROTOCOL_F_RARP,
  L.VHOST_USER_PROTOCOL_F_MTU,
  L.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  L.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
  L.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
  L.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  L.VHOST_USER_PROTOCOL_F_STATUS,
  L.VHOST_USER_PROTOCOL_F_DEVICE_STATE,
);
const protocolFeatures = fc.oneof(
  { weight: 12, arbitrary: fc.constantFrom(USUAL, USUAL, USUAL | mask(L.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES)) },
  {
    weight: 2,
    arbitrary: fc.constantFrom(
      0n,
      mask(ACK),
      USUAL & ~mask(ACK),
      mask(L.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN),
      USUAL | mask(L.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT, L.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN),
      mask(L.VHOST_USER_PROTOCOL_F_CONFIG),
    ),
  },
);

export interface Region {
  gpa: bigint;
  size: bigint;
  user: bigint;
  offset: bigint;
}

/** Two that touch, the first in two other places, two that overlap them, and some that nobody may send. */
const REGIONS: Region[] = [
  { gpa: 0n, size: REGION_BYTES, user: USER, offset: 0n },
  { gpa: REGION_BYTES, size: REGION_BYTES, user: USER + 0x100000n, offset: REGION_BYTES },
  { gpa: 0x100000n, size: REGION_BYTES, user: USER, offset: 0n },
  { gpa: 0n, size: REGION_BYTES, user: USER, offset: REGION_BYTES },
  { gpa: 0n, size: 2n * REGION_BYTES, user: USER, offset: 0n },
  { gpa: 0x200000n, size: REGION_BYTES, user: USER + 0x8000n, offset: 0n },
  { gpa: 0x8000n, size: PAGE, user: 0n, offset: 0n },
  { gpa: 0n, size: 0n, user: USER, offset: 0n },
  { gpa: 0n, size: 1n << 63n, user: USER, offset: 1n << 63n },
  { gpa: 8n, size: PAGE, user: USER, offset: 0n },
  { gpa: 0n, size: REGION_BYTES, user: USER, offset: BigInt(FILE_BYTES) - PAGE },
];
const region = fc.oneof(
  { weight: 5, arbitrary: fc.constantFrom(...REGIONS.slice(0, 2)) },
  { weight: 2, arbitrary: fc.constantFrom(...REGIONS) },
);

/** In the first region, in the second, across both, misaligned in one or other form of ring, nowhere; either address space. */
const place = fc.constantFrom(
  0n,
  PAGE,
  0x2000n,
  0x4000n,
  REGION_BYTES - PAGE,
  REGION_BYTES,
  0x100000n,
  0x102000n,
  2n,
  4n,
  9n,
);
const address = fc
  .tuple(place, place, place, fc.constantFrom(0n, USER, USER, USER))
  .map(([desc, avail, used, space]) => ({ desc: desc + space, avail: avail + space, used: used + space }));
const goodAddress = fc.constantFrom(
  { desc: USER, avail: USER + 0x2000n, used: USER + 0x4000n },
  { desc: USER + 0x100000n, avail: USER + 0x102000n, used: USER + 0x4000n },
  { desc: 0n, avail: 0x2000n, used: 0x4000n },
);

const memoryFd = fc.oneof(
  { weight: 8, arbitrary: fc.constantFrom<FdName>("memory0", "memory1") },
  { weight: 1, arbitrary: fc.constantFrom<FdName>("eventfd", "readonly", "short") },
);
const someFds = fc.array(fc.constantFrom<FdName>("eventfd", "socket", "pipe", "memory0"), { maxLength: 2 });

function u64(value: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(value);
  return bytes;
}

function u32s(...values: number[]): Buffer {
  return Buffer.from(Uint32Array.from(values).buffer);
}

function u64s(...values: bigint[]): Buffer {
  return Buffer.from(BigUint64Array.from(values).buffer);
}

function regionBytes({ gpa, size: bytes, user, offset }: Region): Buffer {
  return u64s(gpa, bytes, user, offset);
}

type Body = { request: number; payload: Buffer; fds: FdName[] };

const plain = (...requests: number[]): fc.Arbitrary<Body> =>
  fc.constantFrom(...requests).map((request) => ({ request, payload: Buffer.alloc(0), fds: [] }));
const withU64 = (request: number, values: fc.Arbitrary<bigint>): fc.Arbitrary<Body> =>
  values.map((value) => ({ request, payload: u64(value), fds: [] }));
const withState = (request: number, numbers: fc.Arbitrary<number>): fc.Arbitrary<Body> =>
  fc.tuple(index, numbers).map(([ring, num]) => ({ request, payload: u32s(ring, num), fds: [] }));

const vringFd: fc.Arbitrary<Body> = fc
  .tuple(
    fc.constantFrom(
      L.VHOST_USER_SET_VRING_KICK,
      L.VHOST_USER_SET_VRING_KICK,
      L.VHOST_USER_SET_VRING_CALL,
      L.VHOST_USER_SET_VRING_ERR,
    ),
    fc.nat(RINGS),
    fc.constantFrom<[bigint, FdName[]]>(
      [0n, ["eventfd"]],
      [0n, ["eventfd"]],
      [0n, ["eventfd"]],
      [0x100n, []],
      [0n, []],
      [0x100n, ["eventfd"]],
      [0n, ["socket"]],
      [0n, ["pipe"]],
      [0n, ["memory0"]],
      [0n, ["eventfd", "eventfd"]],
      [0x200n, ["eventfd"]],
      [1n << 63n, ["eventfd"]],
    ),
  )
  .map(([request, ring, [bits, fds]]) => ({ request, payload: u64(BigInt(ring) | bits), fds }));

const vringAddress: fc.Arbitrary<Body> = fc
  .tuple(
    index,
    fc.oneof({ weight: 3, arbitrary: goodAddress }, { weight: 1, arbitrary: address }),
    fc.oneof({ weight: 9, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.constantFrom(1, 0x80000000) }),
  )
  .map(([ring, { desc, avail, used }, flags]) => ({
    request: L.VHOST_USER_SET_VRING_ADDR,
    payload: Buffer.concat([u32s(ring, flags), u64s(desc, used, avail, 0n)]),
    fds: [],
  }));

const memoryTable: fc.Arbitrary<Body> = fc
  .tuple(
    fc.array(fc.tuple(region, memoryFd), { minLength: 1, maxLength: 3 }),
    fc.oneof({ weight: 12, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.constantFrom(-1, 1, 8) }),
    fc.oneof({ weight: 12, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.constantFrom(-1, 1) }),
  )
  .map(([regions, more, moreFds]) => ({
    request: L.VHOST_USER_SET_MEM_TABLE,
    payload: Buffer.concat([u32s(regions.length + more, 0), ...regions.map(([each]) => regionBytes(each))]),
    fds: [...regions.map(([, fd]) => fd), ...(moreFds > 0 ? (["memory0"] as const) : [])].slice(
      0,
      regions.length + moreFds,
    ),
  }));

const memorySlot: fc.Arbitrary<Body> = fc
  .tuple(
    fc.constantFrom(L.VHOST_USER_ADD_MEM_REG, L.VHOST_USER_ADD_MEM_REG, L.VHOST_USER_REM_MEM_REG),
    region,
    memoryFd,
    fc.oneof({ weight: 8, arbitrary: fc.constant(true) }, { weight: 1, arbitrary: fc.constant(false) }),
  )
  .map(([request, each, fd, usual]) => ({
    request,
    payload: Buffer.concat([u64(0n), regionBytes(each)]),
    fds: (request === L.VHOST_USER_ADD_MEM_REG) === usual ? [fd] : [],
  }));

const inflight: fc.Arbitrary<Body> = fc
  .tuple(
    fc.constantFrom(L.VHOST_USER_GET_INFLIGHT_FD, L.VHOST_USER_SET_INFLIGHT_FD, L.VHOST_USER_SET_INFLIGHT_FD),
    fc.constantFrom(0n, 0x2000n, 0x4100n, 0x8000n, 0x20000n, 1n << 40n),
    fc.constantFrom(0n, 0n, PAGE, 64n, 2n ** 64n - PAGE),
    fc.constantFrom(0, 1, 2, 4, 5),
    fc.constantFrom(0, 1, 256, 256, 512, 32768, 32769),
    fc.oneof(
      { weight: 4, arbitrary: fc.constantFrom<FdName[]>(["memory0"], ["memory1"]) },
      {
        weight: 1,
        arbitrary: fc.constantFrom<FdName[]>([], ["eventfd"], ["readonly"], ["short"], ["memory0", "memory0"]),
      },
    ),
  )
  .map(([request, bytes, offset, queues, entries, fds]) => ({
    request,
    payload: Buffer.concat([u64s(bytes, offset), Buffer.from(Uint16Array.of(queues, entries, 0, 0).buffer)]),
    fds: request === L.VHOST_USER_GET_INFLIGHT_FD && entries !== 1 ? [] : fds,
  }));

/** Any request of the protocol or none of it, with any payload and fds. */
const garbage: fc.Arbitrary<Body> = fc
  .tuple(
    fc.oneof(
      { weight: 9, arbitrary: fc.integer({ min: 0, max: 46 }) },
      { weight: 1, arbitrary: fc.constantFrom(1000, 0xffffffff) },
    ),
    fc.oneof(
      fc.constantFrom(0, 7, 8, 9, 12, 24, 32, 40, 2056, 4084).map((length) => Buffer.alloc(length)),
      fc.uint8Array({ maxLength: 48 }).map((bytes) => Buffer.from(bytes)),
    ),
    someFds,
  )
  // A pipe that takes or gives a state is no matter of a moment.
  .filter(([request]) => request !== L.VHOST_USER_SET_DEVICE_STATE_FD)
  .map(([request, payload, fds]) => ({ request, payload, fds }));

const body: fc.Arbitrary<Body> = fc.oneof(
  { weight: 6, arbitrary: vringFd },
  { weight: 5, arbitrary: withState(L.VHOST_USER_SET_VRING_NUM, size) },
  { weight: 5, arbitrary: vringAddress },
  { weight: 3, arbitrary: withState(L.VHOST_USER_SET_VRING_BASE, base) },
  { weight: 4, arbitrary: withState(L.VHOST_USER_GET_VRING_BASE, fc.constant(0)) },
  { weight: 3, arbitrary: withState(L.VHOST_USER_SET_VRING_ENABLE, fc.constantFrom(0, 1, 1, 2)) },
  { weight: 4, arbitrary: memoryTable },
  { weight: 4, arbitrary: memorySlot },
  { weight: 3, arbitrary: withU64(L.VHOST_USER_SET_FEATURES, features) },
  { weight: 2, arbitrary: withU64(L.VHOST_USER_SET_PROTOCOL_FEATURES, protocolFeatures) },
  { weight: 2, arbitrary: withU64(L.VHOST_USER_SET_STATUS, fc.constantFrom(0n, 3n, 11n, 15n, 0x100n)) },
  { weight: 1, arbitrary: withU64(L.VHOST_USER_NET_SET_MTU, fc.constantFrom(0n, 67n, 1500n, 65535n, 65536n)) },
  { weight: 1, arbitrary: withU64(L.VHOST_USER_SEND_RARP, fc.constantFrom(0n, 0x563412005452n, 0x1n)) },
  { weight: 2, arbitrary: inflight },
  {
    weight: 2,
    arbitrary: plain(
      L.VHOST_USER_GET_FEATURES,
      L.VHOST_USER_GET_PROTOCOL_FEATURES,
      L.VHOST_USER_GET_QUEUE_NUM,
      L.VHOST_USER_SET_OWNER,
      L.VHOST_USER_RESET_OWNER,
      L.VHOST_USER_RESET_DEVICE,
      L.VHOST_USER_GET_MAX_MEM_SLOTS,
      L.VHOST_USER_GET_STATUS,
      L.VHOST_USER_CHECK_DEVICE_STATE,
    ),
  },
  { weight: 1, arbitrary: withState(L.VHOST_USER_GET_VRING_BASE_SKIP_DRAIN, fc.constant(0)) },
  {
    weight: 1,
    arbitrary: fc.constant({
      request: L.VHOST_USER_SET_BACKEND_REQ_FD,
      payload: Buffer.alloc(0),
      fds: ["socket"] as FdName[],
    }),
  },
  { weight: 2, arbitrary: garbage },
);

/** Any command. Most ask for an ack: without one a refusal ends the session. */
export const command: fc.Arbitrary<Command> = fc
  .tuple(body, fc.oneof({ weight: 40, arbitrary: fc.constant(true) }, { weight: 1, arbitrary: fc.constant(false) }))
  .map(([each, ack]) => ({ ...each, ack }));

/** What makes a ring ready and starts it, in a front-end's order or another. */
const ringSetUp: fc.Arbitrary<Command[]> = fc
  .tuple(fc.nat(RINGS - 1), goodSize, goodBase, goodAddress)
  .chain(([ring, num, start, { desc, avail, used }]) =>
    fc.shuffledSubarray(
      [
        { request: L.VHOST_USER_SET_VRING_NUM, ack: true, payload: u32s(ring, num), fds: [] },
        { request: L.VHOST_USER_SET_VRING_BASE, ack: true, payload: u32s(ring, start), fds: [] },
        {
          request: L.VHOST_USER_SET_VRING_ADDR,
          ack: true,
          payload: Buffer.concat([u32s(ring, 0), u64s(desc, used, avail, 0n)]),
          fds: [],
        },
        { request: L.VHOST_USER_SET_VRING_KICK, ack: true, payload: u64(BigInt(ring)), fds: ["eventfd"] as FdName[] },
      ],
      { minLength: 3 },
    ),
  );

/** How a front-end of today begins, with split rings or packed ones. */
const start: fc.Arbitrary<Command[]> = fc
  .tuple(fc.constantFrom(0n, 0n, mask(VIRTIO_F_RING_PACKED)), fc.constantFrom(0, 3, 3, 3, 4, 4))
  .map(([form, count]) =>
    [
      { request: L.VHOST_USER_SET_PROTOCOL_FEATURES, ack: true, payload: u64(USUAL), fds: [] },
      {
        request: L.VHOST_USER_SET_FEATURES,
        ack: true,
        payload: u64(mask(VIRTIO_F_VERSION_1) | BIT_30 | form),
        fds: [],
      },
      {
        request: L.VHOST_USER_SET_MEM_TABLE,
        ack: true,
        payload: Buffer.concat([u32s(2, 0), ...REGIONS.slice(0, 2).map(regionBytes)]),
        fds: ["memory0", "memory0"] as FdName[],
      },
      {
        request: L.VHOST_USER_SET_INFLIGHT_FD,
        ack: true,
        payload: Buffer.concat([u64s(0x20000n, 0n), Buffer.from(Uint16Array.of(3, 256, 0, 0).buffer)]),
        fds: ["memory1"] as FdName[],
      },
    ].slice(0, count),
  );

/** A session: with or without a usual beginning, and with rings that are set up between all the rest. */
export const sequence: fc.Arbitrary<Command[]> = fc
  .tuple(
    start,
    fc.array(fc.oneof({ weight: 6, arbitrary: command.map((each) => [each]) }, { weight: 2, arbitrary: ringSetUp }), {
      maxLength: 40,
      size: "max",
    }),
  )
  .map(([first, rest]) => [...first, ...rest.flat()]);
