/**
 * Every front-end request: its payload size, its gate, what becomes of a refusal, and its handler.
 *
 * Truth: QEMU docs/interop/vhost-user.rst, "Front-end message types"; protocol-reference, sections 4 and 4.1.
 *
 * A refused request changes nothing and its fds are closed. What the front-end learns of it:
 *
 * | refusal         | when                                      | the front-end gets                                |
 * |-----------------|-------------------------------------------|---------------------------------------------------|
 * | a payload       | the request's own reply can say no        | that reply                                        |
 * | "drop"          | its own reply cannot say no               | the connection is closed                          |
 * | "ack or drop"   | later requests build on this one          | a non-zero ack; without REPLY_ACK: closed         |
 * | "ack or ignore" | the session is sound without it           | a non-zero ack; without REPLY_ACK: nothing        |
 */
import { fdKind, isWritable, setNonBlocking } from "../../native/fd.ts";
import type { FdKind } from "../../native/fd.ts";
import { ProtocolError } from "../errors.ts";
import * as L from "../layout/vhost-user.ts";
import { VRING_SIZE_MAX } from "../layout/virtio.ts";
import {
  decodeMemTable,
  decodeU64,
  decodeVringAddress,
  decodeVringState,
  encodeU64,
  encodeVringState,
} from "./codec.ts";
import type { Message } from "./codec.ts";
import { hex } from "./memory-table.ts";
import { bit, OFFERED_PROTOCOL_FEATURES, PROTOCOL_FEATURES_BIT } from "./state.ts";
import type { SessionState } from "./state.ts";
import { checkAddresses } from "./vring.ts";
import type { VringState } from "./vring.ts";

/** Does what is asked and returns the reply's payload, if the request has a reply of its own. @throws RelayError */
type Handler = (state: SessionState, message: Message) => Promise<Buffer | void> | Buffer | void;

export interface Request {
  name: string;
  /** Exact payload size; undefined where the handler checks it. */
  payloadSize?: number;
  /** Protocol feature that must have been negotiated. */
  gate?: number;
  refusal: Buffer | "drop" | "ack or drop" | "ack or ignore";
  /** Absent: what the request belongs to is not offered. */
  handle?: Handler;
}

/** What we write call and err signals to; user-mode Linux passes one end of a socket pair. */
const SIGNAL_KINDS: FdKind[] = ["eventfd", "pipe", "socket"];

const getFeatures: Handler = ({ device }) => encodeU64(device.features | PROTOCOL_FEATURES_BIT);

const setFeatures: Handler = async (state, { payload }) => {
  const features = decodeU64(payload);
  checkOffered("feature", features, state.device.features | PROTOCOL_FEATURES_BIT);
  await state.setFeatures(features);
};

const getProtocolFeatures: Handler = () => encodeU64(OFFERED_PROTOCOL_FEATURES);

const setProtocolFeatures: Handler = (state, { payload }) => {
  const features = decodeU64(payload);
  const inbandNeeds = bit(L.VHOST_USER_PROTOCOL_F_REPLY_ACK) | bit(L.VHOST_USER_PROTOCOL_F_BACKEND_REQ);
  if (features & bit(L.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS) && (features & inbandNeeds) !== inbandNeeds) {
    throw new ProtocolError("INBAND_NOTIFICATIONS without REPLY_ACK and BACKEND_REQ", "drop");
  }
  checkOffered("protocol feature", features, OFFERED_PROTOCOL_FEATURES);
  state.protocolFeatures = features;
};

const getQueueNum: Handler = ({ device }) => encodeU64(BigInt(device.queuePairs));

const setMemTable: Handler = async (state, { payload, fds }) => {
  const records = decodeMemTable(payload);
  if (fds.length !== records.length) throw new ProtocolError(`${fds.length} fds for ${records.length} memory regions`);
  await state.setMemory(records.map((record, index) => ({ ...record, fd: fds[index] as number })));
};

const setVringNum: Handler = async (state, { payload }) => {
  const { index, num } = decodeVringState(payload);
  const ring = state.settableVring(index);
  if (num < 1 || num > VRING_SIZE_MAX || (num & (num - 1)) !== 0) {
    throw new ProtocolError(`ring ${index}: size ${num}, expected a power of two from 1 to ${VRING_SIZE_MAX}`);
  }
  ring.size = num;
  await state.start(ring);
};

const setVringAddr: Handler = async (state, { payload }) => {
  const address = decodeVringAddress(payload);
  const areas = checkAddresses(address);
  const { addresses: before, running } = state.vring(address.index);
  const isSame = before?.desc === areas.desc && before.avail === areas.avail && before.used === areas.used;
  if (running && isSame) return;
  const ring = state.settableVring(address.index);
  ring.addresses = areas;
  if (!state.isPlaceable(ring)) {
    ring.addresses = before;
    throw new ProtocolError(
      `ring ${ring.index}: no single memory region holds each of its areas at ${hex(areas.desc)}, ` +
        `${hex(areas.avail)} and ${hex(areas.used)}`,
    );
  }
  await state.start(ring);
};

const setVringBase: Handler = (state, { payload }) => {
  const { index, num } = decodeVringState(payload);
  const ring = state.settableVring(index);
  if (num > L.VRING_BASE_MAX) throw new ProtocolError(`ring ${index}: base ${num}, a split ring's has 16 bits`);
  ring.base = num;
};

const getVringBase: Handler = async (state, { payload }) => {
  const ring = state.vring(decodeVringState(payload).index);
  return encodeVringState({ index: ring.index, num: await state.stop(ring) });
};

const setVringKick: Handler = async (state, message) => {
  await setVringFd(state, message, "kick", ["eventfd"]);
};

const setVringCall: Handler = async (state, message) => {
  await setVringFd(state, message, "call", SIGNAL_KINDS);
};

const setVringErr: Handler = async (state, message) => {
  await setVringFd(state, message, "err", SIGNAL_KINDS);
};

/** Front-ends may enable rings before SET_FEATURES, when only the offer of bit 30 is known. */
const setVringEnable: Handler = async (state, { payload }) => {
  const { index, num } = decodeVringState(payload);
  const ring = state.vring(index);
  if (num > 1) throw new ProtocolError(`ring ${index}: enable is ${num}, expected 0 or 1`);
  if (state.features !== undefined && (state.features & PROTOCOL_FEATURES_BIT) === 0n) {
    throw new ProtocolError("SET_VRING_ENABLE without VHOST_USER_F_PROTOCOL_FEATURES");
  }
  await state.enable(ring, num === 1);
};

const setBackendReqFd: Handler = (state, { fds }) => {
  const [fd] = fds;
  if (fd === undefined || fds.length !== 1)
    throw new ProtocolError(`${fds.length} fds with SET_BACKEND_REQ_FD, expected 1`);
  if (fdKind(fd) !== "socket") throw new ProtocolError("the fd of SET_BACKEND_REQ_FD is no socket");
  fds.length = 0;
  state.setBackendRequestFd(fd);
};

const nothing: Handler = () => {};

const { U64_SIZE, VRING_STATE_SIZE, VRING_ADDR_SIZE } = L;
const no = encodeU64(1n);
const drop = "drop";
const ackOrDrop = "ack or drop";
const ackOrIgnore = "ack or ignore";

/** Request id -> request. */
export const requests: ReadonlyMap<number, Request> = new Map<number, Request>([
  [L.VHOST_USER_GET_FEATURES, { name: "GET_FEATURES", payloadSize: 0, refusal: drop, handle: getFeatures }],
  [L.VHOST_USER_SET_FEATURES, { name: "SET_FEATURES", payloadSize: U64_SIZE, refusal: ackOrDrop, handle: setFeatures }],
  [L.VHOST_USER_SET_OWNER, { name: "SET_OWNER", payloadSize: 0, refusal: ackOrIgnore, handle: nothing }],
  // Deprecated; the specification recommends to ignore it
  [L.VHOST_USER_RESET_OWNER, { name: "RESET_OWNER", payloadSize: 0, refusal: ackOrIgnore, handle: nothing }],
  [L.VHOST_USER_SET_MEM_TABLE, { name: "SET_MEM_TABLE", refusal: ackOrDrop, handle: setMemTable }],
  [
    L.VHOST_USER_SET_VRING_NUM,
    { name: "SET_VRING_NUM", payloadSize: VRING_STATE_SIZE, refusal: ackOrDrop, handle: setVringNum },
  ],
  [
    L.VHOST_USER_SET_VRING_ADDR,
    { name: "SET_VRING_ADDR", payloadSize: VRING_ADDR_SIZE, refusal: ackOrDrop, handle: setVringAddr },
  ],
  [
    L.VHOST_USER_SET_VRING_BASE,
    { name: "SET_VRING_BASE", payloadSize: VRING_STATE_SIZE, refusal: ackOrDrop, handle: setVringBase },
  ],
  [
    L.VHOST_USER_GET_VRING_BASE,
    { name: "GET_VRING_BASE", payloadSize: VRING_STATE_SIZE, refusal: drop, handle: getVringBase },
  ],
  [
    L.VHOST_USER_SET_VRING_KICK,
    { name: "SET_VRING_KICK", payloadSize: U64_SIZE, refusal: ackOrDrop, handle: setVringKick },
  ],
  [
    L.VHOST_USER_SET_VRING_CALL,
    { name: "SET_VRING_CALL", payloadSize: U64_SIZE, refusal: ackOrDrop, handle: setVringCall },
  ],
  [
    L.VHOST_USER_SET_VRING_ERR,
    { name: "SET_VRING_ERR", payloadSize: U64_SIZE, refusal: ackOrIgnore, handle: setVringErr },
  ],
  [
    L.VHOST_USER_GET_PROTOCOL_FEATURES,
    { name: "GET_PROTOCOL_FEATURES", payloadSize: 0, refusal: drop, handle: getProtocolFeatures },
  ],
  [
    L.VHOST_USER_SET_PROTOCOL_FEATURES,
    { name: "SET_PROTOCOL_FEATURES", payloadSize: U64_SIZE, refusal: ackOrDrop, handle: setProtocolFeatures },
  ],
  [
    L.VHOST_USER_GET_QUEUE_NUM,
    { name: "GET_QUEUE_NUM", payloadSize: 0, gate: L.VHOST_USER_PROTOCOL_F_MQ, refusal: drop, handle: getQueueNum },
  ],
  [
    L.VHOST_USER_SET_VRING_ENABLE,
    { name: "SET_VRING_ENABLE", payloadSize: VRING_STATE_SIZE, refusal: ackOrDrop, handle: setVringEnable },
  ],
  [
    L.VHOST_USER_SET_BACKEND_REQ_FD,
    {
      name: "SET_BACKEND_REQ_FD",
      payloadSize: 0,
      gate: L.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
      refusal: ackOrIgnore,
      handle: setBackendReqFd,
    },
  ],

  [L.VHOST_USER_SET_LOG_BASE, { name: "SET_LOG_BASE", refusal: ackOrDrop }],
  [L.VHOST_USER_SET_LOG_FD, { name: "SET_LOG_FD", refusal: ackOrIgnore }],
  [L.VHOST_USER_SEND_RARP, { name: "SEND_RARP", refusal: ackOrIgnore }],
  [L.VHOST_USER_NET_SET_MTU, { name: "NET_SET_MTU", refusal: ackOrIgnore }],
  [L.VHOST_USER_IOTLB_MSG, { name: "IOTLB_MSG", refusal: no }],
  [L.VHOST_USER_SET_VRING_ENDIAN, { name: "SET_VRING_ENDIAN", refusal: ackOrDrop }],
  [L.VHOST_USER_GET_CONFIG, { name: "GET_CONFIG", refusal: Buffer.alloc(0) }],
  [L.VHOST_USER_SET_CONFIG, { name: "SET_CONFIG", refusal: ackOrIgnore }],
  [L.VHOST_USER_CREATE_CRYPTO_SESSION, { name: "CREATE_CRYPTO_SESSION", refusal: drop }],
  [L.VHOST_USER_CLOSE_CRYPTO_SESSION, { name: "CLOSE_CRYPTO_SESSION", refusal: ackOrIgnore }],
  [L.VHOST_USER_POSTCOPY_ADVISE, { name: "POSTCOPY_ADVISE", refusal: drop }],
  [L.VHOST_USER_POSTCOPY_LISTEN, { name: "POSTCOPY_LISTEN", refusal: ackOrDrop }],
  [L.VHOST_USER_POSTCOPY_END, { name: "POSTCOPY_END", refusal: no }],
  // An mmap size of 0 says failure
  [L.VHOST_USER_GET_INFLIGHT_FD, { name: "GET_INFLIGHT_FD", refusal: Buffer.alloc(L.INFLIGHT_SIZE) }],
  [L.VHOST_USER_SET_INFLIGHT_FD, { name: "SET_INFLIGHT_FD", refusal: ackOrIgnore }],
  [L.VHOST_USER_GPU_SET_SOCKET, { name: "GPU_SET_SOCKET", refusal: ackOrIgnore }],
  [L.VHOST_USER_RESET_DEVICE, { name: "RESET_DEVICE", refusal: ackOrDrop }],
  [L.VHOST_USER_VRING_KICK, { name: "VRING_KICK", refusal: ackOrDrop }],
  [L.VHOST_USER_GET_MAX_MEM_SLOTS, { name: "GET_MAX_MEM_SLOTS", refusal: drop }],
  [L.VHOST_USER_ADD_MEM_REG, { name: "ADD_MEM_REG", refusal: ackOrDrop }],
  [L.VHOST_USER_REM_MEM_REG, { name: "REM_MEM_REG", refusal: ackOrDrop }],
  [L.VHOST_USER_SET_STATUS, { name: "SET_STATUS", refusal: ackOrIgnore }],
  [L.VHOST_USER_GET_STATUS, { name: "GET_STATUS", refusal: drop }],
  [L.VHOST_USER_GET_SHARED_OBJECT, { name: "GET_SHARED_OBJECT", refusal: drop }],
  // Bits 0-7: error; bit 8: no fd comes with the reply
  [L.VHOST_USER_SET_DEVICE_STATE_FD, { name: "SET_DEVICE_STATE_FD", refusal: encodeU64(0x101n) }],
  [L.VHOST_USER_CHECK_DEVICE_STATE, { name: "CHECK_DEVICE_STATE", refusal: no }],
  [L.VHOST_USER_GET_SHMEM_CONFIG, { name: "GET_SHMEM_CONFIG", refusal: drop }],
  [L.VHOST_USER_GET_VRING_BASE_SKIP_DRAIN, { name: "GET_VRING_BASE_SKIP_DRAIN", refusal: drop }],
]);

function checkOffered(what: string, features: bigint, offered: bigint): void {
  const others = features & ~offered;
  if (others !== 0n) throw new ProtocolError(`${what} bits ${hex(others)} were not offered (offered: ${hex(offered)})`);
}

/** A saturated call or err counter must never block a poller, so those fds are made non-blocking. */
async function setVringFd(
  state: SessionState,
  message: Message,
  which: "kick" | "call" | "err",
  kinds: FdKind[],
): Promise<void> {
  const { ring, fd } = vringFd(state, message);
  if (fd !== undefined) {
    if (!kinds.includes(fdKind(fd)) || !isWritable(fd)) {
      throw new ProtocolError(`ring ${ring.index}: the ${which} fd is no writable ${kinds.join(" or ")}`);
    }
    if (which !== "kick") setNonBlocking(fd);
  }
  await state.setFd(ring, which, fd);
  message.fds.length = 0;
}

/** Bits 0-7 are the ring, bit 8 says that no fd comes along. */
function vringFd(state: SessionState, { payload, fds }: Message): { ring: VringState; fd: number | undefined } {
  const value = decodeU64(payload);
  const hasNoFd = (value & BigInt(L.VHOST_USER_VRING_NOFD_MASK)) !== 0n;
  if (value > BigInt(L.VHOST_USER_VRING_IDX_MASK | L.VHOST_USER_VRING_NOFD_MASK)) {
    throw new ProtocolError(`ring number ${hex(value)} has reserved bits set`);
  }
  if (fds.length !== (hasNoFd ? 0 : 1)) throw new ProtocolError(`${fds.length} fds, expected ${hasNoFd ? 0 : 1}`);
  return { ring: state.vring(Number(value) & L.VHOST_USER_VRING_IDX_MASK), fd: fds[0] };
}
