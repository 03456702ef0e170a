/*
 * The bound of bench/tap.ts: what a C program pays to write frames to a TAP interface and to read them from it, one
 * system call a frame. Also what both sides of the bench need: the interface, frames in its queue, and the thread's
 * clock.
 *
 * Built by c-tap.ts. Frames lie in `stride` bytes each, behind a net header of 12 bytes. What fails returns -errno.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NET_HDR_SIZE 12
/* What AF_PACKET takes: the header without num_buffers. */
#define PACKET_HDR_SIZE 10
#define BURST 32

static int request(int socket, unsigned long number, struct ifreq *ifr) {
  return ioctl(socket, number, ifr) < 0 ? -errno : 0;
}

/* Creates a TAP interface that takes every offload. The queue's fd; the interface goes with it. */
int tap_open(const char *name) {
  const int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) return -errno;
  struct ifreq ifr = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE};
  strncpy(ifr.ifr_name, name, IFNAMSIZ - 1);
  int header = NET_HDR_SIZE;
  int result = request(fd, TUNSETIFF, &ifr);
  if (result == 0 && ioctl(fd, TUNSETVNETHDRSZ, &header) < 0) result = -errno;
  if (result == 0 && ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) < 0) result = -errno;
  if (result < 0) close(fd);
  return result < 0 ? result : fd;
}

/* A socket whose frames go into the interface's queue; it receives nothing. */
int tap_sender(const char *name) {
  const int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
  if (fd < 0) return -errno;
  const int on = 1;
  struct ifreq ifr = {0};
  strncpy(ifr.ifr_name, name, IFNAMSIZ - 1);
  struct sockaddr_ll address = {.sll_family = AF_PACKET};
  int result = request(fd, SIOCGIFINDEX, &ifr);
  address.sll_ifindex = ifr.ifr_ifindex;
  if (result == 0 && setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &on, sizeof on) < 0) result = -errno;
  if (result == 0 && setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof on) < 0) result = -errno;
  if (result == 0 && bind(fd, (struct sockaddr *)&address, sizeof address) < 0) result = -errno;
  if (result < 0) close(fd);
  return result < 0 ? result : fd;
}

/* Puts a frame into the queue `count` times. frame: net header and frame, `bytes` of it without the header. */
int tap_fill(int sender, uint8_t *frame, uint32_t bytes, uint32_t count) {
  struct iovec parts[] = {{frame, PACKET_HDR_SIZE}, {frame + NET_HDR_SIZE, bytes}};
  struct mmsghdr messages[BURST];
  for (int i = 0; i < BURST; i++) messages[i].msg_hdr = (struct msghdr){.msg_iov = parts, .msg_iovlen = 2};
  for (uint32_t done = 0; done < count;) {
    const int sent = sendmmsg(sender, messages, count - done < BURST ? count - done : BURST, 0);
    if (sent < 0 && errno != EINTR) return -errno;
    if (sent > 0) done += (uint32_t)sent;
  }
  return (int)count;
}

/* CPU time of this thread. */
double tap_thread_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

/* Writes `count` frames, each of the buffers in turn. CPU time it took in ns, or -errno. */
double tap_write(int fd, const uint8_t *frames, uint32_t stride, uint32_t buffers, uint32_t bytes, uint32_t count) {
  const double start = tap_thread_ns();
  for (uint32_t i = 0, slot = 0; i < count; i++) {
    if (write(fd, frames + (size_t)slot * stride, NET_HDR_SIZE + bytes) < 0) return -errno;
    if (++slot == buffers) slot = 0;
  }
  return tap_thread_ns() - start;
}

/* Reads `count` frames, into each of the buffers in turn. CPU time it took in ns, or -errno. */
double tap_read(int fd, uint8_t *frames, uint32_t stride, uint32_t buffers, uint32_t count) {
  const double start = tap_thread_ns();
  for (uint32_t i = 0, slot = 0; i < count; i++) {
    if (read(fd, frames + (size_t)slot * stride, stride) < 0) return -errno;
    if (++slot == buffers) slot = 0;
  }
  return tap_thread_ns() - start;
}

/* Throws away all frames in the queue. */
void tap_drain(int fd) {
  static uint8_t frame[1 << 17];
  while (read(fd, frame, sizeof frame) > 0);
}
