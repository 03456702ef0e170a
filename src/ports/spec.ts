/** Ports as a user writes them: `KIND[:ADDRESS][,OPTION[=VALUE]]...`. */
import { ConfigError } from "../errors.ts";
import { SEGMENTS_MAX, SEGMENT_PAGES } from "../layout/lane.ts";
import { MTU_MAX, MTU_MIN } from "../layout/virtio.ts";
import type { SocketAddress } from "../vhost-user/endpoint.ts";

export const PORT_SYNTAX =
  "vhost-user:PATH|fd=N[,connect][,queues=N][,queue-unit=pairs|vrings][,mac=MAC][,mtu=N][,guest-announce]" +
  "[,memory-max=SIZE] | tap:NAME|new|fd=N[,fd=N]...[,bridge=NAME][,queues=N][,mtu=N][,io=io_uring|aio|rw] | " +
  "loopback | null";
/** Queue pairs of one vhost-user port (ring indexes are 8 bits wide in SET_VRING_KICK). */
const QUEUE_PAIRS_MAX = 128;
/** sun_path of struct sockaddr_un, less the final zero. */
const SOCKET_PATH_MAX = 107;
/** IFNAMSIZ, less the final zero. */
const INTERFACE_NAME_MAX = 15;
const FD_MAX = 0x7fff_ffff;
/** How the queues of an interface may be read and written, the best one first. */
export const TAP_METHODS = ["io_uring", "aio", "rw"] as const;
export type TapMethod = (typeof TAP_METHODS)[number];
/** What the segments of a guest hold. */
export const MEMORY_MAX_BYTES = BigInt(SEGMENTS_MAX * SEGMENT_PAGES) * 65536n;
const SIZE_UNITS: Record<string, bigint> = { "": 1n, K: 1n << 10n, M: 1n << 20n, G: 1n << 30n };

export interface VhostUserSpec {
  kind: "vhost-user";
  text: string;
  socket: SocketAddress;
  queuePairs: number;
  /** What GET_QUEUE_NUM counts: QEMU expects pairs, rust-vmm front-ends expect vrings. */
  queueUnit: "pairs" | "vrings";
  /** The guest's MAC address, 6 bytes, and MTU, where this port is to tell the guest's driver. */
  mac: Uint8Array | undefined;
  mtu: number | undefined;
  /** The driver announces itself after a migration; it needs a control virtqueue for it, which the front-end must have. */
  guestAnnounce?: boolean;
  /** Bytes of guest memory that are taken; without it, what there is room for. */
  memoryMaxBytes?: bigint;
}

export interface TapSpec {
  kind: "tap";
  text: string;
  /** Of this name, made if it is not there; opened by somebody else, one fd a queue; or made, and named by the kernel. */
  interface: { name: string } | { fds: number[] } | "new";
  /** Name of the bridge to join. */
  bridge?: string;
  /** Queues of the interface; without it as many as the other port has queue pairs. */
  queuePairs?: number;
  mtu?: number;
  /** How its queues are read and written; without it the best way that works here. */
  io?: TapMethod;
}

type PortSpec = VhostUserSpec | TapSpec | { kind: "loopback" | "null"; text: string };

/** @throws ConfigError saying what is wrong with the text and what would be right */
export function parsePort(text: string): PortSpec {
  const colon = text.indexOf(":");
  const [head = "", ...options] = (colon < 0 ? text : text.slice(colon + 1)).split(",");
  const kind = colon < 0 ? head : text.slice(0, colon);
  const address = colon < 0 ? "" : head;
  try {
    switch (kind) {
      case "vhost-user":
        return vhostUser(text, address, options);
      case "tap":
        return tap(text, address, options);
      case "loopback":
      case "null":
        if (address || options.length > 0) throw new ConfigError(`${kind} takes neither address nor options`);
        return { kind, text };
      default:
        throw new ConfigError(`unknown kind "${kind}"; a port is ${PORT_SYNTAX}`);
    }
  } catch (error) {
    throw error instanceof ConfigError ? new ConfigError(`port "${text}": ${error.message}`) : error;
  }
}

/** What each option of a kind of port does. Throws a ConfigError without the port's text. */
type Options<Port> = Record<string, (port: Port, value: string | undefined) => void>;

const SHARED_OPTIONS: Options<VhostUserSpec | TapSpec> = {
  queues(port, value) {
    port.queuePairs = number("queues", value, 1, QUEUE_PAIRS_MAX, "of queue pairs ");
  },
  mtu(port, value) {
    port.mtu = number("mtu", value, MTU_MIN, MTU_MAX);
  },
};

const VHOST_USER_OPTIONS: Options<VhostUserSpec> = {
  ...SHARED_OPTIONS,
  connect(port, value) {
    if (value !== undefined) throw new ConfigError("connect takes no value");
    if ("fd" in port.socket) throw new ConfigError("connect dials a path; an fd is open already");
    port.socket.connect = true;
  },
  "queue-unit"(port, value) {
    if (value !== "pairs" && value !== "vrings") throw new ConfigError(`queue-unit=${value} must be pairs or vrings`);
    port.queueUnit = value;
  },
  mac(port, value) {
    port.mac = macAddress(value ?? "");
  },
  "guest-announce"(port, value) {
    if (value !== undefined) throw new ConfigError("guest-announce takes no value");
    port.guestAnnounce = true;
  },
  "memory-max"(port, value) {
    port.memoryMaxBytes = size("memory-max", value ?? "");
  },
};

const TAP_OPTIONS: Options<TapSpec> = {
  ...SHARED_OPTIONS,
  fd(port, value) {
    const { interface: wanted } = port;
    if (typeof wanted !== "object" || !("fds" in wanted))
      throw new ConfigError("fd= does not go with a name: write tap:fd=3,fd=4");
    const fd = number("fd", value, 0, FD_MAX);
    if (wanted.fds.includes(fd)) throw new ConfigError(`fd=${fd} is given twice; each queue needs one of its own`);
    wanted.fds.push(fd);
  },
  bridge(port, value) {
    port.bridge = interfaceName(value ?? "", "br0");
  },
  io(port, value) {
    const method = TAP_METHODS.find((name) => name === value);
    if (!method) throw new ConfigError(`io=${value ?? ""} must be one of ${TAP_METHODS.join(", ")}`);
    port.io = method;
  },
};

function setOptions<Port>(port: Port, table: Options<Port>, options: string[]): Port {
  for (const option of options) {
    const [name = "", value] = option.split("=", 2);
    if (!Object.hasOwn(table, name)) throw new ConfigError(`unknown option "${option}"; a port is ${PORT_SYNTAX}`);
    table[name]?.(port, value);
  }
  return port;
}

function vhostUser(text: string, address: string, options: string[]): VhostUserSpec {
  const port: VhostUserSpec = {
    kind: "vhost-user",
    text,
    socket: socketAddress(address),
    queuePairs: 1,
    queueUnit: "pairs",
    mac: undefined,
    mtu: undefined,
  };
  return setOptions(port, VHOST_USER_OPTIONS, options);
}

function tap(text: string, address: string, options: string[]): TapSpec {
  const [name, fd] = address.split("=", 2);
  const isFd = name === "fd" && fd !== undefined;
  const wanted = isFd ? { fds: [] } : address === "new" ? "new" : { name: interfaceName(address, "tap:tap0") };
  const port: TapSpec = { kind: "tap", text, interface: wanted };
  setOptions(port, TAP_OPTIONS, isFd ? [address, ...options] : options);
  if (isFd && port.queuePairs !== undefined)
    throw new ConfigError("queues= does not go with fd=: each fd is one queue");
  return port;
}

/** What the kernel takes for a name (dev_valid_name); `%` would be a pattern. */
function interfaceName(name: string, example: string): string {
  if (name === "") throw new ConfigError(`the name of an interface is missing; write ${example}`);
  if (Buffer.byteLength(name) > INTERFACE_NAME_MAX)
    throw new ConfigError(
      `an interface's name has at most ${INTERFACE_NAME_MAX} bytes, "${name}" ${Buffer.byteLength(name)}`,
    );
  if (/[\s/:%]/.test(name) || name === "." || name === "..")
    throw new ConfigError(`"${name}" is no name for an interface: no blanks, "/", ":", "%"`);
  return name;
}

/** A path called fd=3 can be written ./fd=3. */
function socketAddress(address: string): SocketAddress {
  const [name, fd] = address.split("=", 2);
  if (name === "fd" && fd !== undefined) return { fd: number("fd", fd, 0, FD_MAX) };
  if (!address) throw new ConfigError("the socket path is missing; write vhost-user:/run/vm.sock");
  const length = Buffer.byteLength(address);
  if (length > SOCKET_PATH_MAX) {
    throw new ConfigError(`a socket path has at most ${SOCKET_PATH_MAX} bytes, this one ${length}`);
  }
  return { path: address };
}

function number(name: string, text: string | undefined, low: number, high: number, what = ""): number {
  const value = Number(text);
  if (!/^\d+$/.test(text ?? "") || value < low || value > high) {
    throw new ConfigError(`${name}=${text ?? ""} must be a number ${what}from ${low} to ${high}`);
  }
  return value;
}

/** Bytes, as `8G`, `512M`, `64K` or a plain number; at most what there is room for anyway. */
function size(name: string, text: string): bigint {
  const [, digits = "", unit = ""] = /^(\d+)([KMG]?)$/.exec(text) ?? [];
  const bytes = BigInt(digits) * (SIZE_UNITS[unit] ?? 0n);
  if (bytes === 0n || bytes > MEMORY_MAX_BYTES) {
    throw new ConfigError(`${name}=${text} must be a size such as 8G, at most ${MEMORY_MAX_BYTES >> 30n}G`);
  }
  return bytes;
}

/** Six bytes of a station: a group address, or none at all, cannot be a guest's own. */
function macAddress(text: string): Uint8Array {
  const bytes = Uint8Array.from(text.split(":"), (byte) => Number.parseInt(byte, 16));
  const isGroup = ((bytes[0] ?? 0) & 1) !== 0;
  if (!/^[\da-f]{2}(:[\da-f]{2}){5}$/i.test(text) || isGroup || bytes.every((byte) => byte === 0)) {
    throw new ConfigError(`mac=${text} must be the address of one station, for example 52:54:00:12:34:56`);
  }
  return bytes;
}
