/**
 * The host's end of traffic for which no program is at hand: a program of its own, because it runs in a Network.
 *
 *   echo PORT COUNT            sends datagrams of mixed sizes to whom it hears of first; each must come back as it was
 *   serve PORT COUNT           sends a line on each of so many connections, which must come back on it
 *   get URL COUNT SHA256       so many downloads, each over a connection of its own
 *   flood IP PORT COUNT BYTES  sends datagrams as fast as it can
 *
 * Exit status 0 and a line about what was done, or 1 and what went wrong.
 */
import { createHash, randomBytes } from "node:crypto";
import { createSocket } from "node:dgram";
import type { RemoteInfo, Socket } from "node:dgram";
import { once } from "node:events";
import { get as httpGet } from "node:http";
import { createServer, isIPv6 } from "node:net";
import { pathToFileURL } from "node:url";

/** Payloads around what an Ethernet frame holds, and around what fragments are made of, up to the largest there is. */
const EDGES = [1, 2, 17, 18, 19, 63, 64, 65, 1471, 1472, 1473, 1480, 1481, 2952, 2953, 4095, 4096, 8972, 65_507];
/** A datagram that does not come back within this time is lost. */
const PATIENCE_MS = 5000;
const LINE_BYTES = 32;
/** Connections at the same time. */
const CONNECTIONS = 8;

async function echo(port: number, count: number): Promise<string> {
  using socket = Object.assign(createSocket("udp4"), { [Symbol.dispose]: () => socket.close() });
  socket.bind(port);
  await once(socket, "listening");
  console.log("listening");
  const [, peer] = (await once(socket, "message")) as [Buffer, RemoteInfo];
  let bytes = 0;
  for (let i = 0; i < count; i++) {
    const size = EDGES[i] ?? 1 + Math.floor((i % 4 === 0 ? 20_000 : 1472) * Math.random());
    const sent = randomBytes(size);
    socket.send(sent, peer.port, peer.address);
    const [received] = (await once(socket, "message", { signal: AbortSignal.timeout(PATIENCE_MS) }).catch((error) => {
      throw new Error(`datagram ${i}, of ${size} bytes, did not come back: ${error}`);
    })) as [Buffer];
    if (!received.equals(sent)) throw new Error(`datagram ${i}, of ${size} bytes, came back as ${describe(received)}`);
    bytes += size;
  }
  return `${count} datagrams, ${bytes} bytes, came back as they were`;
}

async function serve(port: number, count: number): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  let closed = 0;
  const server = createServer((socket) => {
    const sent = `${randomBytes(LINE_BYTES / 2).toString("hex")}\n`;
    let received = "";
    socket.on("data", (data) => (received += data.toString()));
    socket.on("error", reject);
    socket.on("end", () => {
      if (received !== sent) reject(new Error(`connection ${closed}: ${sent} came back as ${received}`));
      if (++closed === count) resolve();
    });
    socket.write(sent);
  });
  server.listen(port, () => console.log("listening"));
  await promise;
  server.close();
  return `${count} connections`;
}

function describe(received: Buffer): string {
  return `${received.length} others, ${received.subarray(0, 32).toString("hex")}...`;
}

async function get(url: string, count: number, sha256: string): Promise<string> {
  let left = count;
  await Promise.all(
    Array.from({ length: CONNECTIONS }, async () => {
      while (left-- > 0) {
        const found = await digest(url);
        if (found !== sha256) throw new Error(`${url} has SHA-256 ${found}, expected ${sha256}`);
      }
    }),
  );
  return `${count} downloads`;
}

function digest(url: string): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  const hash = createHash("sha256");
  httpGet(url, { agent: false }, (response) => {
    response.on("data", (data: Buffer) => hash.update(data));
    response.on("end", () => resolve(hash.digest("hex")));
    response.on("error", reject);
  }).on("error", reject);
  return promise;
}

async function flood(ip: string, port: number, count: number, bytes: number): Promise<string> {
  using socket = await connected(ip, port);
  const datagram = randomBytes(bytes);
  const failures = new Map<string, number>();
  const send = promisified(socket);
  for (let sent = 0; sent < count; sent += 64) {
    const results = await Promise.all(Array.from({ length: Math.min(64, count - sent) }, () => send(datagram)));
    for (const error of results) if (error) failures.set(error, (failures.get(error) ?? 0) + 1);
  }
  return `${count} datagrams sent; failed: ${JSON.stringify(Object.fromEntries(failures))}`;
}

function promisified(socket: Socket): (datagram: Buffer) => Promise<string | undefined> {
  return (datagram) =>
    new Promise((resolve) => socket.send(datagram, (error) => resolve((error as NodeJS.ErrnoException | null)?.code)));
}

async function connected(ip: string, port: number): Promise<Socket & Disposable> {
  const socket = createSocket(isIPv6(ip.split("%")[0]!) ? "udp6" : "udp4");
  socket.on("error", () => {}); // an ICMP message; what does not come back tells
  socket.connect(port, ip);
  await once(socket, "connect");
  return Object.assign(socket, { [Symbol.dispose]: () => socket.close() });
}

async function main([verb, ...args]: string[]): Promise<string> {
  switch (verb) {
    case "echo":
      return echo(Number(args[0]), Number(args[1]));
    case "serve":
      return serve(Number(args[0]), Number(args[1]));
    case "get":
      return get(args[0]!, Number(args[1]), args[2]!);
    case "flood":
      return flood(args[0]!, Number(args[1]), Number(args[2]), Number(args[3]));
    default:
      throw new Error(`unknown verb ${verb}`);
  }
}

/** Its command line, for a Network to run. */
export function hostEnd(...args: (string | number)[]): string[] {
  return [process.execPath, import.meta.filename, ...args.map(String)];
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  try {
    console.log(await main(process.argv.slice(2)));
  } catch (error) {
    console.log((error as Error).message);
    process.exitCode = 1;
  }
}
