/**
 * The directory of this user's control sockets: one socket per relay process, named by process id.
 *
 * Whoever may write to it could pose as a relay, so it is used only if it is a directory of this user's that nobody else
 * may write to.
 */
import { lstatSync, mkdirSync, readdirSync, rmSync } from "node:fs";
import { createConnection } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ConfigError, SystemError } from "../errors.ts";

const USER = process.getuid?.() ?? 0;
const WRITABLE_BY_OTHERS = 0o022;

/** Where this user's relays put their control sockets. */
export function controlDirectory(): string {
  if (USER === 0) return "/run/vhost-relay";
  const runtime = process.env["XDG_RUNTIME_DIR"];
  return runtime ? join(runtime, "vhost-relay") : join(tmpdir(), `vhost-relay-${USER}`);
}

/** Makes the directory if there is none; removes the sockets of relays that were killed. @throws ConfigError, SystemError */
export async function openDirectory(directory: string): Promise<void> {
  makeDirectory(directory);
  await Promise.all(
    socketsIn(directory).map(async (socket) => {
      if (await isDead(socket)) rmSync(socket, { force: true });
    }),
  );
}

function makeDirectory(directory: string): void {
  try {
    mkdirSync(directory, { recursive: true, mode: 0o700 });
  } catch (error) {
    const { code = "EIO", errno = 0 } = error as NodeJS.ErrnoException;
    if (code === "EEXIST") return; // something that is no directory
    throw new SystemError("mkdir", errno, code, `control directory ${directory}; name a socket by --control`);
  }
}

/** The sockets in the directory, none if it does not exist. @throws ConfigError if it is not to be trusted */
export function socketsIn(directory: string): string[] {
  const found = lstatSync(directory, { throwIfNoEntry: false });
  if (found === undefined) return [];
  const fault = !found.isDirectory()
    ? "is no directory"
    : found.uid !== USER
      ? `belongs to user ${found.uid}`
      : found.mode & WRITABLE_BY_OTHERS
        ? "is writable by others"
        : undefined;
  if (fault !== undefined) {
    throw new ConfigError(`control directory ${directory} ${fault}; remove it, or name a socket by --control`);
  }
  return readdirSync(directory)
    .filter((name) => name.endsWith(".sock"))
    .map((name) => join(directory, name));
}

/** A socket that nobody listens on any more refuses the connection; a live relay that is busy does not. */
function isDead(socket: string): Promise<boolean> {
  return new Promise((resolve) => {
    const connection = createConnection(socket, () => {
      connection.destroy();
      resolve(false);
    });
    connection.on("error", (error: NodeJS.ErrnoException) => resolve(error.code === "ECONNREFUSED"));
  });
}
