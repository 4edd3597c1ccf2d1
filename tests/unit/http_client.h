/* http_client.h - what the tests that speak to a server by hand share: its address, waiting, reading. */
#ifndef QTR_TESTS_HTTP_CLIENT_H
#define QTR_TESTS_HTTP_CLIENT_H

#include <arpa/inet.h>
#include <errno.h>
#include <sys/socket.h>
#include <time.h>

static inline struct sockaddr_in loopback(int port) {
  return (struct sockaddr_in){
      .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static inline void pause_ms(int ms) {
  (void)nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

/* recv, which a process that was stopped and goes on finds interrupted. */
static inline ssize_t take(int fd, void *out, size_t size) {
  ssize_t got;
  do got = recv(fd, out, size, 0);
  while (got < 0 && errno == EINTR);
  return got;
}

#endif
