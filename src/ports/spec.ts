/** Ports as a user writes them: `KIND[:ADDRESS][,OPTION[=VALUE]]...`. */
import { ConfigError } from "../errors.ts";

export const PORT_SYNTAX = "vhost-user:PATH[,connect][,queues=N] | loopback | null";
/** Queue pairs of one vhost-user port (ring indexes are 8 bits wide in SET_VRING_KICK). */
export const QUEUE_PAIRS_MAX = 128;
/** sun_path of struct sockaddr_un, less the final zero. */
const SOCKET_PATH_MAX = 107;

export type PortSpec =
  | { kind: "vhost-user"; text: string; path: string; connect: boolean; queuePairs: number }
  | { kind: "loopback" | "null"; text: string };

/** @throws ConfigError saying what is wrong with the text and what would be right */
export function parsePort(text: string): PortSpec {
  const colon = text.indexOf(":");
  const [head = "", ...options] = (colon < 0 ? text : text.slice(colon + 1)).split(",");
  const kind = colon < 0 ? head : text.slice(0, colon);
  const address = colon < 0 ? "" : head;
  switch (kind) {
    case "vhost-user":
      return vhostUser(text, address, options);
    case "loopback":
    case "null":
      if (address || options.length > 0)
        throw new ConfigError(`port "${text}": ${kind} takes neither address nor options`);
      return { kind, text };
    default:
      throw new ConfigError(`port "${text}": unknown kind "${kind}"; a port is ${PORT_SYNTAX}`);
  }
}

function vhostUser(text: string, path: string, options: string[]): PortSpec {
  if (!path) throw new ConfigError(`port "${text}": the socket path is missing; write vhost-user:/run/vm.sock`);
  if (Buffer.byteLength(path) > SOCKET_PATH_MAX) {
    throw new ConfigError(
      `port "${text}": a socket path has at most ${SOCKET_PATH_MAX} bytes, this one ${Buffer.byteLength(path)}`,
    );
  }
  let connect = false;
  let queuePairs = 1;
  for (const option of options) {
    const [name, value] = option.split("=", 2);
    if (option === "connect") connect = true;
    else if (name === "queues" && value !== undefined) {
      queuePairs = Number(value);
      if (!/^\d+$/.test(value) || queuePairs < 1 || queuePairs > QUEUE_PAIRS_MAX) {
        throw new ConfigError(
          `port "${text}": queues=${value} must be a number of queue pairs from 1 to ${QUEUE_PAIRS_MAX}`,
        );
      }
    } else throw new ConfigError(`port "${text}": unknown option "${option}"; a port is ${PORT_SYNTAX}`);
  }
  return { kind: "vhost-user", text, path, connect, queuePairs };
}
