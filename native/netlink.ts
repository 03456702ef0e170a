/**
 * Requests to the kernel's networking, and news from it: netlink(7), rtnetlink(7). Main thread.
 *
 * A socket belongs to the network namespace that the process was in when it was made.
 */
import {
  NLA_HDRLEN,
  NLA_TYPE_MASK,
  NLM_F_ACK,
  NLM_F_ACK_TLVS,
  NLM_F_CAPPED,
  NLM_F_REQUEST,
  NLMSG_ERROR,
  NLMSG_FLAGS,
  NLMSG_HDRLEN,
  NLMSG_TYPE,
  NLMSGERR_ATTR_MSG,
} from "../src/layout/tun.ts";
import { check, close, EAGAIN, EINTR, ENOBUFS, errno, libc, systemError } from "./libc.ts";
import { watch } from "./poll.ts";

const AF_NETLINK = 16;
const SOCK_RAW = 3;
const SOCK_NONBLOCK = 0o4000;
const SOCK_CLOEXEC = 0o2000000;
const NETLINK_ROUTE = 0;
const SOL_NETLINK = 270;
const NETLINK_EXT_ACK = 11;
const SOCKADDR_NL_SIZE = 12;
const SOCKADDR_NL_GROUPS = 8;
const ALIGN = 4;
const RECEIVE_BYTES = 65536;

const socket = libc.func("int socket(int domain, int type, int protocol)");
const bindCall = libc.func("int bind(int fd, void *address, uint32_t length)");
const setsockopt = libc.func("int setsockopt(int fd, int level, int name, const int *value, uint32_t length)");
const send = libc.func("int64_t send(int fd, void *bytes, size_t length, int flags)");
const recv = libc.func("int64_t recv(int fd, void *bytes, size_t length, int flags)");

export interface NetlinkMessage {
  type: number;
  flags: number;
  /** What follows the header. */
  body: Buffer;
}

/**
 * Sends one request and returns the answers to it. The kernel has answered when send(2) returns.
 * @param name of the request, for the error
 * @throws SystemError with the kernel's errno, and its reason in words if it gave one
 */
export function request(type: number, name: string, body: Buffer, context: string): NetlinkMessage[] {
  const fd = netlinkSocket();
  try {
    setsockopt(fd, SOL_NETLINK, NETLINK_EXT_ACK, [1], 4);
    const header = Buffer.alloc(NLMSG_HDRLEN);
    header.writeUInt32LE(NLMSG_HDRLEN + body.length, 0);
    header.writeUInt16LE(type, NLMSG_TYPE);
    header.writeUInt16LE(NLM_F_REQUEST | NLM_F_ACK, NLMSG_FLAGS);
    const bytes = Buffer.concat([header, body]);
    check(Number(send(fd, bytes, bytes.length, 0)), "send", context);
    const answers: NetlinkMessage[] = [];
    for (;;) {
      const received = receive(fd);
      if (received === "empty" || received === "overrun") throw systemError("recv", context);
      for (const message of received) {
        if (message.type !== NLMSG_ERROR) answers.push(message);
        else if (message.body.readInt32LE(0) === 0) return answers;
        else throw refusal(message, name, context);
      }
    }
  } finally {
    close(fd);
  }
}

/**
 * Calls `onMessage` for all that the kernel tells the groups (RTMGRP_*), `onOverrun` when some of it was lost, until
 * disposed.
 */
export function subscribe(
  groups: number,
  onMessage: (message: NetlinkMessage) => void,
  onOverrun: () => void,
): Disposable {
  const fd = netlinkSocket();
  let interest: Disposable | undefined;
  function read(): void {
    // whoever is told may dispose
    while (interest) {
      const received = receive(fd);
      if (received === "empty") return;
      if (received !== "overrun") {
        received.forEach(onMessage);
        continue;
      }
      // An error ends the watch, see poll.ts. What is still to be read is older than what was lost.
      while (receive(fd) !== "empty");
      interest[Symbol.dispose]();
      interest = watch(fd, { readable: true }, read);
      onOverrun();
    }
  }
  try {
    const address = Buffer.alloc(SOCKADDR_NL_SIZE);
    address.writeUInt16LE(AF_NETLINK);
    address.writeUInt32LE(groups, SOCKADDR_NL_GROUPS);
    check(bindCall(fd, address, address.length), "bind", "subscribing to news of network interfaces");
    interest = watch(fd, { readable: true }, read);
  } catch (error) {
    close(fd);
    throw error;
  }
  return {
    [Symbol.dispose]() {
      if (!interest) return;
      interest[Symbol.dispose]();
      interest = undefined;
      close(fd);
    },
  };
}

/** Attributes by their type; of several of one type the last. */
export function attributes(bytes: Buffer): Map<number, Buffer> {
  const found = new Map<number, Buffer>();
  for (let offset = 0; offset + NLA_HDRLEN <= bytes.length;) {
    const length = Math.max(bytes.readUInt16LE(offset), NLA_HDRLEN);
    found.set(bytes.readUInt16LE(offset + 2) & NLA_TYPE_MASK, bytes.subarray(offset + NLA_HDRLEN, offset + length));
    offset += aligned(length);
  }
  return found;
}

/** One attribute with its padding. @param value a number is a u32 */
export function attribute(type: number, value: number | string): Buffer {
  const payload = typeof value === "string" ? Buffer.from(`${value}\0`) : Buffer.alloc(4);
  if (typeof value === "number") payload.writeUInt32LE(value);
  const bytes = Buffer.alloc(aligned(NLA_HDRLEN + payload.length));
  bytes.writeUInt16LE(NLA_HDRLEN + payload.length, 0);
  bytes.writeUInt16LE(type, 2);
  payload.copy(bytes, NLA_HDRLEN);
  return bytes;
}

function refusal(message: NetlinkMessage, name: string, context: string): Error {
  const reason = reasonOf(message);
  return systemError(name, reason === undefined ? context : `${context}: ${reason}`, -message.body.readInt32LE(0));
}

/** The kernel's own words, which follow the request, of which only the header may be there. */
function reasonOf({ flags, body }: NetlinkMessage): string | undefined {
  if ((flags & NLM_F_ACK_TLVS) === 0) return undefined;
  const requestBytes = (flags & NLM_F_CAPPED) === 0 ? body.readUInt32LE(4) : NLMSG_HDRLEN;
  const text = attributes(body.subarray(4 + aligned(requestBytes))).get(NLMSGERR_ATTR_MSG);
  return text?.toString().replace(/\0+$/, "");
}

/** The messages of one datagram; "overrun": the kernel had more news than the socket holds. */
function receive(fd: number): NetlinkMessage[] | "empty" | "overrun" {
  const bytes = Buffer.alloc(RECEIVE_BYTES);
  const count = Number(recv(fd, bytes, bytes.length, 0));
  if (count < 0 && (errno() === EAGAIN || errno() === EINTR)) return "empty";
  if (count < 0 && errno() === ENOBUFS) return "overrun";
  check(count, "recv", "reading from a netlink socket");
  const messages: NetlinkMessage[] = [];
  for (let offset = 0; offset + NLMSG_HDRLEN <= count;) {
    const length = Math.max(bytes.readUInt32LE(offset), NLMSG_HDRLEN);
    const type = bytes.readUInt16LE(offset + NLMSG_TYPE);
    const flags = bytes.readUInt16LE(offset + NLMSG_FLAGS);
    messages.push({ type, flags, body: bytes.subarray(offset + NLMSG_HDRLEN, Math.min(offset + length, count)) });
    offset += aligned(length);
  }
  return messages;
}

function netlinkSocket(): number {
  return check(
    socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, NETLINK_ROUTE),
    "socket",
    "opening a netlink socket; is AF_NETLINK allowed (systemd: RestrictAddressFamilies=)?",
  );
}

function aligned(length: number): number {
  return Math.ceil(length / ALIGN) * ALIGN;
}
