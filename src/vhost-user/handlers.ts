/**
 * What each offered request does: reads its payload, checks what concerns it, changes the session's state.
 *
 * Truth: QEMU docs/interop/vhost-user.rst, "Front-end message types"; docs/PROTOCOL.md, 4, 4.1 and 5.
 * A handler returns the reply's payload if the request has a reply of its own, and throws a RelayError, having changed
 * nothing, to refuse. It takes the fds it keeps out of the message.
 */
import { fdKind, isWritable, setNonBlocking } from "../../native/fd.ts";
import type { FdKind } from "../../native/fd.ts";
import { ProtocolError } from "../errors.ts";
import * as L from "../layout/vhost-user.ts";
import { MTU_MAX, MTU_MIN, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1 } from "../layout/virtio.ts";
import {
  decodeConfig,
  decodeInflight,
  decodeMemTable,
  decodeSingleRegion,
  decodeU64,
  decodeVringAddress,
  decodeVringState,
  encodeConfig,
  encodeInflight,
  encodeU64,
  encodeVringState,
} from "./codec.ts";
import type { Message } from "./codec.ts";
import { createInflight, InflightRegion } from "./inflight.ts";
import { hex } from "./memory-table.ts";
import { bit, PROTOCOL_FEATURES_BIT } from "./state.ts";
import type { SessionState } from "./state.ts";
import { checkAddresses } from "./vring.ts";
import type { VringState } from "./vring.ts";

/** A reply with fds, which are closed once it is sent. */
export interface ReplyWithFds {
  payload: Buffer;
  fds: number[];
}

type Reply = Buffer | ReplyWithFds | void;

export type Handler = (state: SessionState, message: Message) => Promise<Reply> | Reply;

/** What we write call and err signals to; user-mode Linux passes one end of a socket pair. */
const SIGNAL_KINDS: FdKind[] = ["eventfd", "socket"];

const STATUS_MAX = 0xffn;

/** Protocol features and what they need; beside INBAND_NOTIFICATIONS, where the connection is to be closed. */
const NEEDED_PROTOCOL_FEATURES = [
  [L.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT, L.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD],
  [L.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN, L.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT],
] as const;

export const getFeatures: Handler = ({ device }) => encodeU64(device.features | PROTOCOL_FEATURES_BIT);

export const setFeatures: Handler = async (state, { payload }) => {
  const features = decodeU64(payload);
  state.featuresRefused = true;
  checkOffered("feature", features, state.device.features | PROTOCOL_FEATURES_BIT);
  if (features & bit(VIRTIO_F_RING_PACKED) && !(features & bit(VIRTIO_F_VERSION_1))) {
    throw new ProtocolError("VIRTIO_F_RING_PACKED without VIRTIO_F_VERSION_1: legacy drivers have no packed rings");
  }
  await state.setFeatures(features);
  state.featuresRefused = false;
};

export const getProtocolFeatures: Handler = ({ offeredProtocolFeatures }) => encodeU64(offeredProtocolFeatures);

export const setProtocolFeatures: Handler = (state, { payload }) => {
  const features = decodeU64(payload);
  const inbandNeeds = bit(L.VHOST_USER_PROTOCOL_F_REPLY_ACK) | bit(L.VHOST_USER_PROTOCOL_F_BACKEND_REQ);
  if (features & bit(L.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS) && (features & inbandNeeds) !== inbandNeeds) {
    throw new ProtocolError("INBAND_NOTIFICATIONS without REPLY_ACK and BACKEND_REQ", "drop");
  }
  checkOffered("protocol feature", features, state.offeredProtocolFeatures);
  for (const [feature, needed] of NEEDED_PROTOCOL_FEATURES) {
    if (features & bit(feature) && !(features & bit(needed))) {
      throw new ProtocolError(`protocol feature ${feature} without ${needed}, which it builds on`);
    }
  }
  state.protocolFeatures = features;
};

export const getQueueNum: Handler = ({ device, vrings }) =>
  encodeU64(BigInt(device.queueUnit === "pairs" ? device.queuePairs : vrings.length));

export const setMemTable: Handler = async (state, { payload, fds }) => {
  const records = decodeMemTable(payload);
  if (fds.length !== records.length) throw new ProtocolError(`${fds.length} fds for ${records.length} memory regions`);
  await state.setMemory(records.map((record, index) => ({ ...record, fd: fds[index] as number })));
};

export const getMaxMemSlots: Handler = () => encodeU64(BigInt(L.MEM_SLOTS_MAX));

export const addMemReg: Handler = async (state, { payload, fds }) => {
  const [fd] = fds;
  if (fd === undefined || fds.length !== 1) throw new ProtocolError(`${fds.length} fds with ADD_MEM_REG, expected 1`);
  await state.addMemory({ ...decodeSingleRegion(payload), fd });
};

/** Some front-ends send the region's fd along: it is closed. */
export const remMemReg: Handler = (state, { payload }) => state.removeMemory(decodeSingleRegion(payload));

export const setVringNum: Handler = async (state, { payload }) => {
  const { index, num } = decodeVringState(payload);
  const ring = state.settableVring(index);
  ring.checkSize(num, state.form);
  await state.configure(ring, { size: num });
};

export const setVringAddr: Handler = async (state, { payload }) => {
  const address = decodeVringAddress(payload);
  const areas = checkAddresses(address, state.form);
  const { addresses: before, running } = state.vring(address.index);
  const isSame = before?.desc === areas.desc && before.avail === areas.avail && before.used === areas.used;
  if (running && isSame) return;
  await state.configure(state.settableVring(address.index), { addresses: areas });
};

export const setVringBase: Handler = (state, { payload }) => {
  const { index, num } = decodeVringState(payload);
  const ring = state.settableVring(index);
  ring.base = ring.decodeBase(num, state.form);
};

export const getVringBase: Handler = async (state, { payload }) => {
  const ring = state.vring(decodeVringState(payload).index);
  await state.stop(ring);
  return encodeVringState({ index: ring.index, num: ring.encodeBase(state.form) });
};

export const setVringKick: Handler = async (state, message) => {
  await setVringFd(state, message, "kick", ["eventfd"]);
};

export const setVringCall: Handler = async (state, message) => {
  await setVringFd(state, message, "call", SIGNAL_KINDS);
};

export const setVringErr: Handler = async (state, message) => {
  await setVringFd(state, message, "err", SIGNAL_KINDS);
};

/** Front-ends may enable rings before SET_FEATURES, when only the offer of bit 30 is known. */
export const setVringEnable: Handler = async (state, { payload }) => {
  const { index, num } = decodeVringState(payload);
  const ring = state.vring(index);
  if (num > 1) throw new ProtocolError(`ring ${index}: enable is ${num}, expected 0 or 1`);
  if (state.features !== undefined && (state.features & PROTOCOL_FEATURES_BIT) === 0n) {
    throw new ProtocolError("SET_VRING_ENABLE without VHOST_USER_F_PROTOCOL_FEATURES");
  }
  await state.enable(ring, num === 1);
};

export const setBackendReqFd: Handler = (state, { fds }) => {
  const [fd] = fds;
  if (fd === undefined || fds.length !== 1)
    throw new ProtocolError(`${fds.length} fds with SET_BACKEND_REQ_FD, expected 1`);
  if (fdKind(fd) !== "socket") throw new ProtocolError("the fd of SET_BACKEND_REQ_FD is no socket");
  fds.length = 0;
  state.setBackendRequestFd(fd);
};

export const getConfig: Handler = ({ device }, { payload }) => {
  const { offset, size } = decodeConfig(payload);
  const reply = encodeConfig({ offset, size });
  reply.set(device.config?.subarray(offset, offset + size) ?? [], L.CONFIG_HEADER_SIZE);
  return reply;
};

export const setConfig: Handler = () => {
  throw new ProtocolError("the whole configuration space is read-only");
};

/** A guest came from another host, and its driver cannot announce it. */
export const sendRarp: Handler = (state, { payload }) => {
  const mac = payload.subarray(0, L.MAC_SIZE);
  if (((mac[0] ?? 0) & 1) !== 0 || mac.every((byte) => byte === 0)) {
    throw new ProtocolError(`${mac.toString("hex")} is no address of a station`);
  }
  state.announce(mac);
};

export const setDeviceStateFd: Handler = (state, { payload, fds }) => {
  const direction = payload.readUInt32LE(L.DEVICE_STATE_DIRECTION);
  const phase = payload.readUInt32LE(L.DEVICE_STATE_PHASE);
  const [fd] = fds;
  if (fd === undefined || fds.length !== 1) {
    throw new ProtocolError(`${fds.length} fds with SET_DEVICE_STATE_FD, expected 1`);
  }
  if (direction > L.DEVICE_STATE_LOAD || phase !== L.DEVICE_STATE_PHASE_STOPPED) {
    throw new ProtocolError(`device state with direction ${direction}, phase ${phase}: neither save nor load, stopped`);
  }
  state.transferState(fd, direction === L.DEVICE_STATE_SAVE ? "save" : "load");
  return encodeU64(BigInt(L.DEVICE_STATE_NOFD));
};

/** Waits until the state has gone through. */
export const checkDeviceState: Handler = async (state) => {
  await state.checkTransfer();
  return encodeU64(0n);
};

/** Comes before SET_FEATURES, so it cannot depend on what the driver acknowledges. */
export const netSetMtu: Handler = ({ device }, { payload }) => {
  const mtu = decodeU64(payload);
  if (mtu < MTU_MIN || mtu > MTU_MAX) throw new ProtocolError(`MTU ${mtu}, expected ${MTU_MIN} to ${MTU_MAX}`);
  device.setMtu(Number(mtu));
};

/** The front-end keeps the region for the next back-end, and gives it to us like to that one: by SET_INFLIGHT_FD. */
export const getInflightFd: Handler = ({ vrings, form }, { payload, fds }) => {
  if (fds.length > 0) throw new ProtocolError(`${fds.length} fds with GET_INFLIGHT_FD, expected none`);
  const { queues, queueSize } = decodeInflight(payload);
  const { fd, mmapSize } = createInflight({ queues, queueSize, vrings: vrings.length, form });
  return { payload: encodeInflight({ mmapSize, mmapOffset: 0n, queues, queueSize }), fds: [fd] };
};

export const setInflightFd: Handler = (state, { payload, fds }) => {
  const [fd] = fds;
  if (fd === undefined || fds.length !== 1) {
    throw new ProtocolError(`${fds.length} fds with SET_INFLIGHT_FD, expected 1`);
  }
  state.setInflight(new InflightRegion(decodeInflight(payload), fd, state.vrings.length, state.form));
  fds.length = 0;
};

export const resetDevice: Handler = (state) => state.resetDevice();

export const setStatus: Handler = async (state, { payload }) => {
  const status = decodeU64(payload);
  if (status > STATUS_MAX) throw new ProtocolError(`device status ${hex(status)} does not fit its byte`);
  await state.setStatus(Number(status));
};

export const getStatus: Handler = ({ status }) => encodeU64(BigInt(status));

export const nothing: Handler = () => {};

function checkOffered(what: string, features: bigint, offered: bigint): void {
  const others = features & ~offered;
  if (others !== 0n) throw new ProtocolError(`${what} bits ${hex(others)} were not offered (offered: ${hex(offered)})`);
}

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
    // Where asynchronous I/O is forbidden signalPeer (native/eventfd.ts) writes to eventfds, which may not block a poller.
    // The open file is the peer's too, so it is left alone otherwise: sockets are written to without waiting anyway.
    if (which !== "kick" && fdKind(fd) === "eventfd") setNonBlocking(fd);
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
