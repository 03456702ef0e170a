/** `vhost-relay run`: serves links until SIGTERM or SIGINT, or until no front-end can come any more. */
import { ownControlSocket, serveControl } from "../control/api.ts";
import { EventLog } from "../control/log.ts";
import type { PollMode } from "../datapath/poller.ts";
import { Relay, type PortText } from "../datapath/relay.ts";
import { ConfigError } from "../errors.ts";

interface RunOptions {
  link: string[];
  socketPath?: string;
  fd?: number;
  backend?: string;
  poll: PollMode;
  cpus: number[];
  stallMs: number;
  control?: string;
}

export async function run(options: RunOptions): Promise<void> {
  const stop = Promise.withResolvers<void>();
  let failure: unknown;
  let serving: Relay | undefined;
  /** A link with an end that nobody can connect to any more carries nothing. */
  const stopIfOver = (): void => {
    if (serving?.state.links.every(({ ports }) => ports.some(({ state }) => state === "ended"))) stop.resolve();
  };
  const log = new EventLog(process.stderr);
  const relay = await Relay.start({
    links: linksOf(options),
    poll: options.poll,
    cpus: options.cpus,
    stallMs: options.stallMs,
    onEvent: (event) => {
      log.write(event);
      if (event.type === "fatal") {
        failure = event.error;
        stop.resolve();
      }
      if (event.type === "end") stopIfOver();
    },
  });
  await using _relay = relay;
  serving = relay;
  stopIfOver();
  await using _control = await serveControl(relay, options.control ?? ownControlSocket());
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.once(signal, () => stop.resolve());
  await stop.promise;
  if (failure !== undefined) process.exitCode = 1;
}

function linksOf({ link, socketPath, fd, backend }: RunOptions): [PortText, PortText][] {
  const links = link.map((text): [PortText, PortText] => {
    // Both ends may hold '=' in options (queues=2): the link's own is the one before a port's kind.
    const parts = /^(.+?)=((?:vhost-user:|tap:|loopback$|null$).*)$/.exec(text);
    if (!parts?.[1] || !parts[2])
      throw new ConfigError(
        `--link "${text}": write two ports joined by "=", for example vhost-user:/run/a.sock=vhost-user:/run/b.sock`,
      );
    return [parts[1], parts[2]];
  });
  if (socketPath !== undefined && fd !== undefined)
    throw new ConfigError("--socket-path and --fd exclude each other: give one socket");
  const port = fd === undefined ? socketPath && `vhost-user:${socketPath}` : { fd };
  if ((port === undefined) !== (backend === undefined))
    throw new ConfigError("--backend and one of --socket-path and --fd belong together");
  if (port !== undefined && backend !== undefined) links.push([port, backend]);
  if (links.length === 0)
    throw new ConfigError("nothing to serve: give --link A=B, or --socket-path PATH (or --fd N) --backend PORT");
  return links;
}
