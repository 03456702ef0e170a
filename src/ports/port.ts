/**
 * A port: one end of a link.
 *
 * What a lane needs of it is its memory and its running virtqueues. A port that wants to change either asks its link
 * to do so (`Change`), which parks the lanes meanwhile.
 */
import type { RequestMethod } from "../../native/request-queue.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { InflightPlace } from "../vhost-user/device.ts";

export type { InflightPlace };

/** Where a virtqueue area lies in the guest's segments. */
export interface Area {
  segment: number;
  offset: bigint;
}

/** A virtqueue that is started, as a lane needs it. */
export interface RunningVring {
  /** Identity of the start: the same for all updates until it is stopped. */
  start: symbol;
  size: number;
  /** Position of the first chain to take, see src/layout/lane.ts. */
  base: number;
  desc: Area;
  avail: Area;
  used: Area;
  headerBytes: number;
  /** OFFLOAD_* of src/layout/lane.ts: what the driver leaves to the device (transmitq), or takes from it (receiveq). */
  offloads?: number;
  /** VRING_* of src/layout/lane.ts but READY. */
  flags: number;
  kick: number | undefined;
  call: number | undefined;
  err: number | undefined;
  /** Where to keep the used index for whoever comes after us. */
  inflight?: InflightPlace | undefined;
}

/** Parks the lanes of the port's link, applies a change to the port, and lets them run by it. */
export type Change = (apply: () => void) => Promise<void>;

/** A port without a guest: `loopback` returns what its peer sends, `null` swallows it. */
interface PassivePort {
  readonly kind: "loopback" | "null";
  /** As written by the user. */
  readonly spec: string;
}

/** A port with a guest behind it. */
export interface GuestPort {
  readonly kind: "vhost-user";
  readonly spec: string;
  readonly queuePairs: number;
  readonly memory: GuestMemory;
  /** The guest's MTU, if anybody said. */
  readonly mtu: number | undefined;
  /** What its front-end is doing, for the operator. */
  readonly state: "listening" | "connecting" | "connected" | "running" | "ended";
  /** The virtqueue, if it is started. */
  vring(index: number): RunningVring | undefined;
  /** Features that the guest's driver acknowledged. */
  readonly acknowledged: bigint;
  /** Begins to serve. */
  open(link: LinkSide): Promise<void>;
  close(): Promise<void>;
}

/** What a guest port is given by its link. */
export interface LinkSide {
  change: Change;
  /** Next avail index of a started virtqueue; called within a change. */
  nextAvail(index: number): number;
  /** Sends a frame of at most 1514 bytes to the other end as if this guest had; dropped if nobody receives. */
  inject(frame: Uint8Array): void;
  /** Numbers of the offload features to offer. */
  offloads: readonly number[];
}

/** A port that is an interface of this host: frames pass through files, one for each queue pair. */
export interface FilePort {
  readonly kind: "tap";
  readonly spec: string;
  /** Of the interface. */
  readonly name: string;
  /** Non-blocking fds, at least one. */
  readonly queues: readonly number[];
  /** Numbers of the offload features that a guest may be offered. Known once it is open. */
  readonly features: readonly number[];
  /** Undefined: not known. */
  readonly mtu: number | undefined;
  readonly state: "up" | "down" | "gone";
  /** The ways to read and write the files: the one that is used, and those to be tried should it fail. */
  readonly methods: readonly RequestMethod[];
  /**
   * @param change for changes that the lanes must know of
   * @throws ConfigError, SystemError; nothing is left behind
   */
  open(change: Change): void;
  close(): void;
  /** Within a change: what the guest at the other end acknowledged, and the queue pairs on which it takes frames. */
  follow(features: bigint, isInUse: (pair: number) => boolean): void;
  /** Gives the interface a frame as if the guest had sent it; dropped if it does not take it now. */
  inject(frame: Uint8Array): void;
}

export type AnyPort = GuestPort | FilePort | PassivePort;

export function isGuestPort(port: AnyPort): port is GuestPort {
  return port.kind === "vhost-user";
}

export function isFilePort(port: AnyPort): port is FilePort {
  return port.kind === "tap";
}
