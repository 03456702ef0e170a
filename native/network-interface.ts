/**
 * Network interfaces: what they are, changes to them, and news of them. Truth: rtnetlink(7), linux/if_link.h.
 *
 * All are of the network namespace that the process is in. Main thread.
 */
import {
  IFF_UP,
  IFINFOMSG_CHANGE,
  IFINFOMSG_FLAGS,
  IFINFOMSG_INDEX,
  IFINFOMSG_SIZE,
  IFLA_ADDRESS,
  IFLA_IFNAME,
  IFLA_INFO_DATA,
  IFLA_INFO_KIND,
  IFLA_LINKINFO,
  IFLA_MASTER,
  IFLA_MTU,
  IFLA_NEW_NETNSID,
  IFLA_TUN_MULTI_QUEUE,
  IFLA_TUN_NUM_DISABLED_QUEUES,
  IFLA_TUN_NUM_QUEUES,
  IFLA_TUN_OWNER,
  IFLA_TUN_PERSIST,
  IFLA_TUN_TYPE,
  IFF_TAP,
  RTM_DELLINK,
  RTM_GETLINK,
  RTM_NEWLINK,
  RTM_SETLINK,
  RTMGRP_LINK,
} from "../src/layout/tun.ts";
import { SystemError } from "../src/errors.ts";
import { attribute, attributes, request, subscribe, type NetlinkMessage } from "./netlink.ts";

export interface NetworkInterface {
  index: number;
  name: string;
  /** It was brought up; whether there is a carrier is another matter. */
  isUp: boolean;
  mtu: number;
  /** Hardware address, as 52:54:00:12:34:56. */
  address: string;
  /** Index of the bridge (or bond, ...) that it belongs to, 0: none. */
  master: number;
  /** As `ip -d link` says: "tun" for TUN and TAP, "bridge", ...; undefined for a network card. */
  kind: string | undefined;
  tun: TunState | undefined;
}

/** What only a TUN or TAP interface has. */
interface TunState {
  isTap: boolean;
  isMultiQueue: boolean;
  /** It stays when nobody has it open. */
  isPersistent: boolean;
  /** The user who may open it without CAP_NET_ADMIN. */
  owner: number | undefined;
  /** How many queues are open, in all programs, detached ones included; for one without multi_queue unknown. */
  queues: number;
}

/** @param key name or index @throws SystemError if the kernel cannot be asked */
export function findInterface(key: string | number): NetworkInterface | undefined {
  const [header, name] =
    typeof key === "number" ? [infoHeader(key), []] : [infoHeader(0), [attribute(IFLA_IFNAME, key)]];
  try {
    const answers = request(
      RTM_GETLINK,
      "RTM_GETLINK",
      Buffer.concat([header, ...name]),
      `looking for interface ${key}`,
    );
    return answers.flatMap((answer) => (answer.type === RTM_NEWLINK ? [parse(answer)] : []))[0];
  } catch (error) {
    if (error instanceof SystemError && error.code === "ENODEV") return undefined;
    throw error;
  }
}

export interface InterfaceChange {
  isUp?: boolean;
  mtu?: number;
  /** Index of the bridge to join, 0: leave it. */
  master?: number;
}

/** Changes an interface; if it fails, some of it may be done. @throws SystemError EPERM: without CAP_NET_ADMIN */
export function changeInterface(index: number, change: InterfaceChange, context: string): void {
  const header = infoHeader(index);
  if (change.isUp !== undefined) {
    header.writeUInt32LE(change.isUp ? IFF_UP : 0, IFINFOMSG_FLAGS);
    header.writeUInt32LE(IFF_UP, IFINFOMSG_CHANGE);
  }
  const parts = [header];
  if (change.mtu !== undefined) parts.push(attribute(IFLA_MTU, change.mtu));
  if (change.master !== undefined) parts.push(attribute(IFLA_MASTER, change.master));
  request(RTM_SETLINK, "RTM_SETLINK", Buffer.concat(parts), context);
}

/**
 * Tells of changes of one interface until disposed: how it is now, "gone", or "moved" to another network namespace, after
 * which there is no more news. One change may be told of several times.
 */
export function watchInterface(index: number, onNews: (now: NetworkInterface | "gone" | "moved") => void): Disposable {
  return subscribe(
    RTMGRP_LINK,
    (message) => {
      if (![RTM_NEWLINK, RTM_DELLINK].includes(message.type)) return;
      // A bridge tells of its ports by messages of its own, with another family.
      if (message.body.readUInt8(0) !== 0 || message.body.readInt32LE(IFINFOMSG_INDEX) !== index) return;
      if (message.type === RTM_NEWLINK) onNews(parse(message));
      else onNews(linkAttributes(message).has(IFLA_NEW_NETNSID) ? "moved" : "gone");
    },
    () => onNews(findInterface(index) ?? "gone"),
  );
}

function infoHeader(index: number): Buffer {
  const bytes = Buffer.alloc(IFINFOMSG_SIZE);
  bytes.writeInt32LE(index, IFINFOMSG_INDEX);
  return bytes;
}

function linkAttributes({ body }: NetlinkMessage): Map<number, Buffer> {
  return attributes(body.subarray(IFINFOMSG_SIZE));
}

function parse(message: NetlinkMessage): NetworkInterface {
  const found = linkAttributes(message);
  const info = attributes(found.get(IFLA_LINKINFO) ?? Buffer.alloc(0));
  const kind = info.has(IFLA_INFO_KIND) ? text(info.get(IFLA_INFO_KIND)) : undefined;
  return {
    index: message.body.readInt32LE(IFINFOMSG_INDEX),
    name: text(found.get(IFLA_IFNAME)),
    isUp: (message.body.readUInt32LE(IFINFOMSG_FLAGS) & IFF_UP) !== 0,
    mtu: number(found.get(IFLA_MTU)),
    address: [...(found.get(IFLA_ADDRESS) ?? [])].map((byte) => byte.toString(16).padStart(2, "0")).join(":"),
    master: number(found.get(IFLA_MASTER)),
    kind,
    tun: kind === "tun" ? parseTun(attributes(info.get(IFLA_INFO_DATA) ?? Buffer.alloc(0))) : undefined,
  };
}

function parseTun(data: Map<number, Buffer>): TunState {
  return {
    isTap: number(data.get(IFLA_TUN_TYPE)) === IFF_TAP,
    isMultiQueue: number(data.get(IFLA_TUN_MULTI_QUEUE)) === 1,
    isPersistent: number(data.get(IFLA_TUN_PERSIST)) === 1,
    owner: data.has(IFLA_TUN_OWNER) ? number(data.get(IFLA_TUN_OWNER)) : undefined,
    queues: number(data.get(IFLA_TUN_NUM_QUEUES)) + number(data.get(IFLA_TUN_NUM_DISABLED_QUEUES)),
  };
}

/** u8 or u32; 0 without the attribute. */
function number(bytes: Buffer | undefined): number {
  return bytes && bytes.length > 0 ? bytes.readUIntLE(0, Math.min(bytes.length, 4)) : 0;
}

function text(bytes: Buffer | undefined): string {
  return bytes?.toString().replace(/\0+$/, "") ?? "";
}
