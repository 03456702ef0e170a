/**
 * Readiness of file descriptors in the event loop: koffi.node.poll, which is libuv's uv_poll.
 *
 * koffi calls back straight from libuv, outside Node's callback scope: promises settled there would wait for some
 * other event. So the callback is passed on through setImmediate, which runs in the same turn of the loop. A
 * handle that is not referenced stops silently, so the set below keeps them.
 */
import koffi from "koffi";
import type { node } from "koffi";

interface Interest {
  readable?: boolean;
  writable?: boolean;
}

const handles = new Set<node.PollHandle>();

/**
 * Calls `callback` whenever the fd is readable or writable (or in error: the next read or write says which), level
 * triggered, until disposed. Dispose before closing the fd. One watch an fd. After an error it reports no more.
 */
export function watch(fd: number, interest: Interest, callback: () => void): Disposable {
  let pending: NodeJS.Immediate | undefined;
  const handle = koffi.node.poll(fd, interest, () => {
    pending ??= setImmediate(() => {
      pending = undefined;
      callback();
    });
  });
  handles.add(handle);
  return {
    [Symbol.dispose]() {
      if (!handles.delete(handle)) return;
      clearImmediate(pending);
      handle.close();
    },
  };
}
