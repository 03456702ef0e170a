/**
 * Every front-end request: its payload size, what becomes of a refusal, its handler, its gate.
 *
 * Truth: QEMU docs/interop/vhost-user.rst, "Front-end message types"; docs/PROTOCOL.md, 4 and 4.1.
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
import * as L from "../layout/vhost-user.ts";
import { encodeU64 } from "./codec.ts";
import * as handlers from "./handlers.ts";
import type { Handler } from "./handlers.ts";

/** A payload is the reply that says no. */
type Refusal = Buffer | "drop" | "ack or drop" | "ack or ignore";

export interface Request {
  name: string;
  refusal: Refusal;
  /** Exact payload size; undefined where the handler checks it. */
  payloadSize?: number | undefined;
  /** Absent: what the request belongs to is not offered. */
  handle?: Handler;
  /** Protocol feature that must have been negotiated. */
  gate?: number | undefined;
}

const { U64_SIZE, VRING_STATE_SIZE, VRING_ADDR_SIZE, SINGLE_REGION_SIZE, INFLIGHT_SIZE } = L;
const MQ = L.VHOST_USER_PROTOCOL_F_MQ;
const BACKEND_REQ = L.VHOST_USER_PROTOCOL_F_BACKEND_REQ;
const MTU = L.VHOST_USER_PROTOCOL_F_MTU;
const CONFIG = L.VHOST_USER_PROTOCOL_F_CONFIG;
const RARP = L.VHOST_USER_PROTOCOL_F_RARP;
const STATE = L.VHOST_USER_PROTOCOL_F_DEVICE_STATE;
const SKIP_DRAIN = L.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN;
const INFLIGHT = L.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD;
const RESET = L.VHOST_USER_PROTOCOL_F_RESET_DEVICE;
const STATUS = L.VHOST_USER_PROTOCOL_F_STATUS;
const MEM_SLOTS = L.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS;
const no = encodeU64(1n);
const drop = "drop";
const ackOrDrop = "ack or drop";
const ackOrIgnore = "ack or ignore";

/** Request id -> request. */
export const requests: ReadonlyMap<number, Request> = new Map<number, Request>([
  [L.VHOST_USER_GET_FEATURES, offered("GET_FEATURES", 0, drop, handlers.getFeatures)],
  [L.VHOST_USER_SET_FEATURES, offered("SET_FEATURES", U64_SIZE, ackOrDrop, handlers.setFeatures)],
  [L.VHOST_USER_SET_OWNER, offered("SET_OWNER", 0, ackOrIgnore, handlers.nothing)],
  // Deprecated; the specification recommends to ignore it
  [L.VHOST_USER_RESET_OWNER, offered("RESET_OWNER", 0, ackOrIgnore, handlers.nothing)],
  [L.VHOST_USER_SET_MEM_TABLE, offered("SET_MEM_TABLE", undefined, ackOrDrop, handlers.setMemTable)],
  [L.VHOST_USER_SET_VRING_NUM, offered("SET_VRING_NUM", VRING_STATE_SIZE, ackOrDrop, handlers.setVringNum)],
  [L.VHOST_USER_SET_VRING_ADDR, offered("SET_VRING_ADDR", VRING_ADDR_SIZE, ackOrDrop, handlers.setVringAddr)],
  [L.VHOST_USER_SET_VRING_BASE, offered("SET_VRING_BASE", VRING_STATE_SIZE, ackOrDrop, handlers.setVringBase)],
  [L.VHOST_USER_GET_VRING_BASE, offered("GET_VRING_BASE", VRING_STATE_SIZE, drop, handlers.getVringBase)],
  [L.VHOST_USER_SET_VRING_KICK, offered("SET_VRING_KICK", U64_SIZE, ackOrDrop, handlers.setVringKick)],
  [L.VHOST_USER_SET_VRING_CALL, offered("SET_VRING_CALL", U64_SIZE, ackOrDrop, handlers.setVringCall)],
  [L.VHOST_USER_SET_VRING_ERR, offered("SET_VRING_ERR", U64_SIZE, ackOrIgnore, handlers.setVringErr)],
  [L.VHOST_USER_GET_PROTOCOL_FEATURES, offered("GET_PROTOCOL_FEATURES", 0, drop, handlers.getProtocolFeatures)],
  [
    L.VHOST_USER_SET_PROTOCOL_FEATURES,
    offered("SET_PROTOCOL_FEATURES", U64_SIZE, ackOrDrop, handlers.setProtocolFeatures),
  ],
  [L.VHOST_USER_GET_QUEUE_NUM, offered("GET_QUEUE_NUM", 0, drop, handlers.getQueueNum, MQ)],
  [L.VHOST_USER_SET_VRING_ENABLE, offered("SET_VRING_ENABLE", VRING_STATE_SIZE, ackOrDrop, handlers.setVringEnable)],
  [
    L.VHOST_USER_SET_BACKEND_REQ_FD,
    offered("SET_BACKEND_REQ_FD", 0, ackOrIgnore, handlers.setBackendReqFd, BACKEND_REQ),
  ],
  [L.VHOST_USER_NET_SET_MTU, offered("NET_SET_MTU", U64_SIZE, ackOrIgnore, handlers.netSetMtu, MTU)],
  // A reply without payload says no
  [L.VHOST_USER_GET_CONFIG, offered("GET_CONFIG", undefined, Buffer.alloc(0), handlers.getConfig, CONFIG)],
  [L.VHOST_USER_SET_CONFIG, offered("SET_CONFIG", undefined, ackOrIgnore, handlers.setConfig, CONFIG)],
  [
    L.VHOST_USER_GET_INFLIGHT_FD,
    // An mmap size of 0 says failure
    offered("GET_INFLIGHT_FD", INFLIGHT_SIZE, Buffer.alloc(INFLIGHT_SIZE), handlers.getInflightFd, INFLIGHT),
  ],
  [
    L.VHOST_USER_SET_INFLIGHT_FD,
    offered("SET_INFLIGHT_FD", INFLIGHT_SIZE, ackOrIgnore, handlers.setInflightFd, INFLIGHT),
  ],
  [L.VHOST_USER_RESET_DEVICE, offered("RESET_DEVICE", 0, ackOrDrop, handlers.resetDevice, RESET)],
  [L.VHOST_USER_GET_MAX_MEM_SLOTS, offered("GET_MAX_MEM_SLOTS", 0, drop, handlers.getMaxMemSlots, MEM_SLOTS)],
  [L.VHOST_USER_ADD_MEM_REG, offered("ADD_MEM_REG", SINGLE_REGION_SIZE, ackOrDrop, handlers.addMemReg, MEM_SLOTS)],
  [L.VHOST_USER_REM_MEM_REG, offered("REM_MEM_REG", SINGLE_REGION_SIZE, ackOrDrop, handlers.remMemReg, MEM_SLOTS)],
  [L.VHOST_USER_SET_STATUS, offered("SET_STATUS", U64_SIZE, ackOrIgnore, handlers.setStatus, STATUS)],
  [L.VHOST_USER_GET_STATUS, offered("GET_STATUS", 0, drop, handlers.getStatus, STATUS)],
  [L.VHOST_USER_SEND_RARP, offered("SEND_RARP", U64_SIZE, ackOrIgnore, handlers.sendRarp, RARP)],
  [
    L.VHOST_USER_SET_DEVICE_STATE_FD,
    // Bits 0-7: error; bit 8: no fd comes with the reply
    offered("SET_DEVICE_STATE_FD", L.DEVICE_STATE_SIZE, encodeU64(0x101n), handlers.setDeviceStateFd, STATE),
  ],
  [L.VHOST_USER_CHECK_DEVICE_STATE, offered("CHECK_DEVICE_STATE", 0, no, handlers.checkDeviceState, STATE)],
  [
    L.VHOST_USER_GET_VRING_BASE_SKIP_DRAIN,
    // Nothing is ever in flight when a ring has stopped, so there is nothing to skip
    offered("GET_VRING_BASE_SKIP_DRAIN", VRING_STATE_SIZE, drop, handlers.getVringBase, SKIP_DRAIN),
  ],

  [L.VHOST_USER_SET_LOG_BASE, refused("SET_LOG_BASE", ackOrDrop)],
  [L.VHOST_USER_SET_LOG_FD, refused("SET_LOG_FD", ackOrIgnore)],
  [L.VHOST_USER_IOTLB_MSG, refused("IOTLB_MSG", no)],
  [L.VHOST_USER_SET_VRING_ENDIAN, refused("SET_VRING_ENDIAN", ackOrDrop)],
  [L.VHOST_USER_CREATE_CRYPTO_SESSION, refused("CREATE_CRYPTO_SESSION", drop)],
  [L.VHOST_USER_CLOSE_CRYPTO_SESSION, refused("CLOSE_CRYPTO_SESSION", ackOrIgnore)],
  [L.VHOST_USER_POSTCOPY_ADVISE, refused("POSTCOPY_ADVISE", drop)],
  [L.VHOST_USER_POSTCOPY_LISTEN, refused("POSTCOPY_LISTEN", ackOrDrop)],
  [L.VHOST_USER_POSTCOPY_END, refused("POSTCOPY_END", no)],
  [L.VHOST_USER_GPU_SET_SOCKET, refused("GPU_SET_SOCKET", ackOrIgnore)],
  [L.VHOST_USER_VRING_KICK, refused("VRING_KICK", ackOrDrop)],
  [L.VHOST_USER_GET_SHARED_OBJECT, refused("GET_SHARED_OBJECT", drop)],
  [L.VHOST_USER_GET_SHMEM_CONFIG, refused("GET_SHMEM_CONFIG", drop)],
]);

function offered(
  name: string,
  payloadSize: number | undefined,
  refusal: Refusal,
  handle: Handler,
  gate?: number,
): Request {
  return { name, payloadSize, refusal, handle, gate };
}

function refused(name: string, refusal: Refusal): Request {
  return { name, refusal };
}
