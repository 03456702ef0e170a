/**
 * Numbers of TUN/TAP and of network interfaces: ioctls on /dev/net/tun, and the messages of rtnetlink.
 *
 * Truth: linux/if_tun.h, linux/if.h, linux/netlink.h, linux/rtnetlink.h, linux/if_link.h. test/layout compares every number
 * here with the kernel's headers. Plain constants only.
 */

// ioctls; the argument is a pointer if nothing else is said
export const TUNSETIFF = 0x4004_54ca; // struct ifreq
export const TUNSETOFFLOAD = 0x4004_54d0; // TUN_F_*, by value
export const TUNGETIFF = 0x8004_54d2; // struct ifreq
export const TUNATTACHFILTER = 0x4010_54d5; // struct sock_fprog
export const TUNDETACHFILTER = 0x4010_54d6;
export const TUNSETVNETHDRSZ = 0x4004_54d8; // int
export const TUNSETQUEUE = 0x4004_54d9; // struct ifreq
export const SIOCGIFHWADDR = 0x8927; // struct ifreq

// struct ifreq: char name[16], then a union
export const IFREQ_SIZE = 40;
export const IFREQ_FLAGS = 16; // u16
export const IFREQ_HWADDR = 18; // behind the u16 sa_family
export const IFNAMSIZ = 16; // with the final zero
export const ETH_ALEN = 6;

// flags of TUNSETIFF, TUNGETIFF and TUNSETQUEUE
export const IFF_TUN = 0x0001;
export const IFF_TAP = 0x0002;
export const IFF_MULTI_QUEUE = 0x0100;
export const IFF_ATTACH_QUEUE = 0x0200;
export const IFF_DETACH_QUEUE = 0x0400;
export const IFF_NO_PI = 0x1000;
export const IFF_VNET_HDR = 0x4000;

// TUNSETOFFLOAD: what the kernel may leave to the reader of a frame
export const TUN_F_CSUM = 0x01;
export const TUN_F_TSO4 = 0x02; // with CSUM only
export const TUN_F_TSO6 = 0x04; // with CSUM only
export const TUN_F_TSO_ECN = 0x08; // with TSO4 or TSO6 only
export const TUN_F_USO4 = 0x20; // with CSUM and USO6 only; since Linux 6.2
export const TUN_F_USO6 = 0x40; // with CSUM and USO4 only

// struct sock_fprog { u16 len; pointer filter }, struct sock_filter { u16 code; u8 jt, jf; u32 k }
export const SOCK_FPROG_SIZE = 16;
export const SOCK_FPROG_FILTER = 8;
export const SOCK_FILTER_SIZE = 8;
export const BPF_RET_K = 0x06;

// struct nlmsghdr: u32 len, u16 type, u16 flags, u32 seq, u32 pid
export const NLMSG_HDRLEN = 16;
export const NLMSG_TYPE = 4;
export const NLMSG_FLAGS = 6;
export const NLM_F_REQUEST = 0x001;
export const NLM_F_ACK = 0x004;
export const NLM_F_CAPPED = 0x100;
export const NLM_F_ACK_TLVS = 0x200;
export const NLMSG_ERROR = 2; // i32 errno, negative, then the request's header, or all of it
export const NLMSGERR_ATTR_MSG = 1;
// struct nlattr: u16 length with this header, u16 type; the next one aligned to 4
export const NLA_HDRLEN = 4;
export const NLA_TYPE_MASK = 0x3fff;

export const RTM_NEWLINK = 16;
export const RTM_DELLINK = 17;
export const RTM_GETLINK = 18;
export const RTM_SETLINK = 19;
export const RTMGRP_LINK = 1;

// struct ifinfomsg: u8 family, u8 pad, u16 type, i32 index, u32 flags, u32 change
export const IFINFOMSG_SIZE = 16;
export const IFINFOMSG_INDEX = 4;
export const IFINFOMSG_FLAGS = 8;
export const IFINFOMSG_CHANGE = 12;
export const IFF_UP = 1;

// attributes of a link
export const IFLA_ADDRESS = 1;
export const IFLA_IFNAME = 3;
export const IFLA_MTU = 4;
export const IFLA_MASTER = 10;
export const IFLA_LINKINFO = 18;
export const IFLA_INFO_KIND = 1;
export const IFLA_INFO_DATA = 2;
export const IFLA_NEW_NETNSID = 45;
// attributes in IFLA_INFO_DATA of kind "tun"
export const IFLA_TUN_OWNER = 1;
export const IFLA_TUN_TYPE = 3;
export const IFLA_TUN_PERSIST = 6;
export const IFLA_TUN_MULTI_QUEUE = 7;
export const IFLA_TUN_NUM_QUEUES = 8;
export const IFLA_TUN_NUM_DISABLED_QUEUES = 9;
