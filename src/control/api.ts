/**
 * The control API: HTTP and JSON on a unix socket, one socket per relay process.
 *
 *   GET /v1/state   RelayState (src/datapath/relay.ts)
 *
 * Sockets live in one directory (directory.ts), so that `vhost-relay show` finds every relay of this user.
 */
import { createServer, request, type Server } from "node:http";
import { join } from "node:path";
import { SystemError } from "../errors.ts";
import { removeStaleSocket } from "../../native/socket.ts";
import type { Relay, RelayState } from "../datapath/relay.ts";
import { controlDirectory, openDirectory, socketsIn } from "./directory.ts";

/** A relay that answered, and what it said. */
export interface FoundRelay {
  socket: string;
  state: RelayState;
}

const ANSWER_TIMEOUT_MS = 2000;

/** The default control socket of this process. */
export function ownControlSocket(): string {
  return join(controlDirectory(), `${process.pid}.sock`);
}

/**
 * Serves the API until disposed of; then the socket is gone.
 * @throws ConfigError if the directory is not to be trusted, SystemError if the socket cannot be made
 */
export async function serveControl(relay: Relay, path: string): Promise<AsyncDisposable> {
  if (path === ownControlSocket()) await openDirectory(controlDirectory());
  removeStaleSocket(path); // left by a relay that was killed
  const server = createServer((message, response) => {
    const known = message.url === "/v1/state";
    const status = !known ? 404 : message.method !== "GET" ? 405 : 200;
    const body =
      status === 200 ? relay.state : { error: `${message.method} ${message.url}: there is only GET /v1/state` };
    response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(body));
  });
  await listen(server, path);
  return {
    [Symbol.asyncDispose]: () =>
      new Promise<void>((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

function listen(server: Server, path: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once("error", (error: NodeJS.ErrnoException) => {
      const code = error.code ?? "EIO";
      const advice = code === "EADDRINUSE" ? "; remove it if no relay runs, or give --control another path" : "";
      reject(new SystemError("listen", error.errno ?? 0, code, `control socket ${path}${advice}`));
    });
    server.listen(path, resolve);
  });
}

/** Asks a relay for its state. @throws SystemError if none answers there */
export function readState(socket: string): Promise<RelayState> {
  return new Promise((resolve, reject) => {
    const fail = (error: NodeJS.ErrnoException) =>
      reject(new SystemError("connect", error.errno ?? 0, error.code ?? "EIO", `no relay answers on ${socket}`));
    const sent = request({ socketPath: socket, path: "/v1/state", timeout: ANSWER_TIMEOUT_MS }, (response) => {
      let text = "";
      response.setEncoding("utf8");
      response.on("data", (part: string) => (text += part));
      response.on("error", fail);
      response.on("end", () => {
        try {
          resolve(JSON.parse(text) as RelayState);
        } catch {
          fail(Object.assign(new Error("not JSON"), { code: "EPROTO" }));
        }
      });
    });
    sent.on("timeout", () => sent.destroy(Object.assign(new Error("timeout"), { code: "ETIMEDOUT" })));
    sent.on("error", fail);
    sent.end();
  });
}

/** Every relay of this user that answers; only reads. @throws ConfigError if the directory is not to be trusted */
export async function findRelays(): Promise<FoundRelay[]> {
  const sockets = socketsIn(controlDirectory());
  const answers = await Promise.allSettled(sockets.map(async (socket) => ({ socket, state: await readState(socket) })));
  return answers.filter((answer) => answer.status === "fulfilled").map((answer) => answer.value);
}
